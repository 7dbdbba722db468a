// What halo_attention.cu offers: halo attention of arrays on a GPU, of float, __half or __nv_bfloat16, heads of up to 128 channels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>

#include "shape.h"

namespace halo {

// As their namesakes in halo_attention.h.
template <class T>
cudaError_t forward(const Shape& s, const Inputs<T>& in, T* out, cudaStream_t stream);

template <class T>
cudaError_t backward(const Shape& s, const Inputs<T>& in, const T* dout, const Gradients<T>& gradients, float* workspace,
                     cudaStream_t stream);

// Floats of scratch memory that `backward` needs on the GPU: two numbers per query, and the tables' gradients in parts.
size_t workspace(const Shape& s);

}  // namespace halo
