// The Paddle operators `halo_attention`, `convolution`, `batch_norm_act` and `max_pool` with their gradients, and
// `convolution_norm_act` for inference, on a CPU, the attention on a GPU too where this is compiled with PADDLE_WITH_CUDA: shapes
// are checked here, the headers do the work.
#include "paddle/extension.h"

#include "batch_norm.h"
#include "convolution.h"
#include "halo_attention.h"
#include "max_pool.h"
#ifdef PADDLE_WITH_CUDA
#include "halo_attention_gpu.h"
#endif

namespace {

using paddle::Tensor;
using Dims = std::vector<int64_t>;

halo::Shape shape_of(const Tensor& q, const Tensor& kv, const Tensor& height_rel, const Tensor& width_rel, int num_heads,
                     int block_size, int halo_size) {
#ifndef PADDLE_WITH_CUDA
  PD_CHECK(q.is_cpu(), "halo_attention: built for CPU tensors only");
#endif
  PD_CHECK(q.place() == kv.place() && q.place() == height_rel.place() && q.place() == width_rel.place(),
           "halo_attention: q, kv and the tables must be on one device");
  PD_CHECK(q.dtype() == kv.dtype() && q.dtype() == height_rel.dtype() && q.dtype() == width_rel.dtype(),
           "halo_attention: q, kv and the tables must have one dtype");
  PD_CHECK(num_heads > 0 && block_size > 0 && halo_size >= 0, "halo_attention: num_heads and block_size must be positive");
  const Dims qs = q.shape(), ks = kv.shape(), rows = height_rel.shape();
  PD_CHECK(qs.size() == 4 && ks.size() == 4 && qs[0] == ks[0], "halo_attention: q and kv must be (B, C, H, W) with one B");
  PD_CHECK(rows.size() == 2 && rows[0] == 2 * (block_size + 2 * halo_size) - 1 && width_rel.shape() == rows,
           "halo_attention: both tables must be (2 * (block_size + 2 * halo_size) - 1, d)");
  const int64_t d = rows[1];
  PD_CHECK(qs[1] == num_heads * d && ks[1] % num_heads == 0 && ks[1] / num_heads > d,
           "halo_attention: q must have num_heads * d channels and kv num_heads * (d + v), d being the width of the tables");
  halo::Shape s{static_cast<int>(qs[0]), num_heads, static_cast<int>(d), static_cast<int>(ks[1] / num_heads - d),
                static_cast<int>(ks[2]), static_cast<int>(ks[3]), block_size, halo_size,
                static_cast<int>(qs[2]), static_cast<int>(qs[3])};
  PD_CHECK(s.stride() > 0, "halo_attention: no stride that divides block_size leads from the map of kv to that of q");
  return s;
}

template <class T>
halo::Inputs<T> inputs_of(const Tensor& q, const Tensor& kv, const Tensor& height_rel, const Tensor& width_rel) {
  const auto data = [](const Tensor& x) { return static_cast<const T*>(x.data()); };
  return {data(q), data(kv), data(height_rel), data(width_rel)};
}

#ifdef PADDLE_WITH_CUDA
// Calls work(zero), zero being of the type that CUDA has for `dtype`; it returns a cudaError_t.
template <class Work>
void on_gpu(const halo::Shape& s, paddle::DataType dtype, Work work) {
  if (s.B == 0) return;
  PD_CHECK(s.d <= 128 && s.v <= 128,
           "halo_attention: on a GPU heads may have 128 channels at most; MODEL.ATTENTION composed has no limit");
  PD_CHECK(dtype == paddle::DataType::FLOAT32 || dtype == paddle::DataType::FLOAT16 || dtype == paddle::DataType::BFLOAT16,
           "halo_attention: on a GPU q must be float32, float16 or bfloat16");
  const cudaError_t error = dtype == paddle::DataType::FLOAT32   ? work(float())
                            : dtype == paddle::DataType::FLOAT16 ? work(__half())
                                                                 : work(__nv_bfloat16());
  PD_CHECK(error == cudaSuccess, "halo_attention: ", cudaGetErrorString(error));
}
#endif

std::vector<Tensor> forward(const Tensor& q, const Tensor& kv, const Tensor& height_rel, const Tensor& width_rel,
                            int num_heads, int block_size, int halo_size) {
  const halo::Shape s = shape_of(q, kv, height_rel, width_rel, num_heads, block_size, halo_size);
  Tensor out = paddle::empty({s.B, s.N * s.v, s.Hq, s.Wq}, q.dtype(), q.place());
#ifdef PADDLE_WITH_CUDA
  if (q.is_gpu()) {
    on_gpu(s, q.dtype(), [&](auto zero) {
      using T = decltype(zero);
      return halo::forward<T>(s, inputs_of<T>(q, kv, height_rel, width_rel), static_cast<T*>(out.data()), q.stream());
    });
    return {out};
  }
#endif
  PD_DISPATCH_FLOATING_TYPES(q.dtype(), "halo_attention", [&] {
    halo::forward(s, inputs_of<data_t>(q, kv, height_rel, width_rel), out.data<data_t>());
  });
  return {out};
}

template <class T>
halo::Gradients<T> gradients_of(const std::vector<Tensor>& grads) {
  const auto data = [&](int i) { return static_cast<T*>(const_cast<void*>(grads[i].data())); };
  return {data(0), data(1), data(2), data(3)};
}

std::vector<Tensor> backward(const Tensor& q, const Tensor& kv, const Tensor& height_rel, const Tensor& width_rel,
                             const Tensor& dout, int num_heads, int block_size, int halo_size) {
  const halo::Shape s = shape_of(q, kv, height_rel, width_rel, num_heads, block_size, halo_size);
  std::vector<Tensor> grads;
  for (const Tensor* x : {&q, &kv, &height_rel, &width_rel}) grads.push_back(paddle::empty(x->shape(), x->dtype(), x->place()));
#ifdef PADDLE_WITH_CUDA
  if (q.is_gpu()) {
    Tensor scratch = paddle::empty({static_cast<int64_t>(halo::workspace(s))}, paddle::DataType::FLOAT32, q.place());
    on_gpu(s, q.dtype(), [&](auto zero) {
      using T = decltype(zero);
      return halo::backward<T>(s, inputs_of<T>(q, kv, height_rel, width_rel), static_cast<const T*>(dout.data()),
                               gradients_of<T>(grads), scratch.data<float>(), q.stream());
    });
    return grads;
  }
#endif
  PD_DISPATCH_FLOATING_TYPES(q.dtype(), "halo_attention_grad", [&] {
    halo::backward(s, inputs_of<data_t>(q, kv, height_rel, width_rel), dout.data<data_t>(), gradients_of<data_t>(grads));
  });
  return grads;
}

// A size that is not known yet is -1 and stays -1.
std::vector<Dims> infer_shape(const Dims& q, const Dims& kv, const Dims& height_rel, const Dims& width_rel, int num_heads,
                              int block_size, int halo_size) {
  return {{q[0], kv[1] - num_heads * height_rel[1], q[2], q[3]}};
}

std::vector<Dims> infer_grad_shape(const Dims& q, const Dims& kv, const Dims& height_rel, const Dims& width_rel, const Dims& dout,
                                   int num_heads, int block_size, int halo_size) {
  return {q, kv, height_rel, width_rel};
}

std::vector<paddle::DataType> infer_dtype(const paddle::DataType& q, const paddle::DataType&, const paddle::DataType&,
                                          const paddle::DataType&) {
  return {q};
}

void check_convolution(const Tensor& x, const Tensor& weight, int stride) {
  PD_CHECK(x.is_cpu() && weight.is_cpu() && x.dtype() == weight.dtype(), "convolution: needs CPU tensors of one dtype");
  const Dims xs = x.shape(), ws = weight.shape();
  PD_CHECK(xs.size() == 4 && ws.size() == 4 && ws[1] == xs[1] && ws[2] == ws[3] && ws[2] % 2,
           "convolution: x must be (B, C, H, W) and weight (O, C, k, k) with an odd k");
  PD_CHECK(ws[0] > 0 && ws[1] > 0 && stride > 0, "convolution: O, C and the stride must be positive");
}

template <class T>
halo::Map<T> map_of(T* data, const Dims& shape) {
  return {data, static_cast<int>(shape[0]), static_cast<int>(shape[1]), static_cast<int>(shape[2]), static_cast<int>(shape[3])};
}

std::vector<Dims> infer_convolution_shape(const Dims& x, const Dims& weight, int stride, bool) {
  const auto strided = [&](int64_t n) { return n < 0 ? n : (n + stride - 1) / stride; };
  return {{x[0], weight[0], strided(x[2]), strided(x[3])}};
}

std::vector<Dims> infer_convolution_grad_shape(const Dims& x, const Dims& weight, const Dims&, int, bool) { return {x, weight}; }

std::vector<paddle::DataType> infer_convolution_dtype(const paddle::DataType& x, const paddle::DataType&) { return {x}; }

std::vector<Tensor> convolution_forward(const Tensor& x, const Tensor& weight, int stride, bool input_gradient) {
  check_convolution(x, weight, stride);
  Tensor out = paddle::empty(infer_convolution_shape(x.shape(), weight.shape(), stride, input_gradient)[0], x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.dtype(), "convolution", [&] {
    halo::convolution(map_of(x.data<data_t>(), x.shape()), weight.data<data_t>(), static_cast<int>(weight.shape()[2]), stride,
                      map_of(out.data<data_t>(), out.shape()));
  });
  return {out};
}

// Without `input_gradient` that of x is not computed, and stays whatever the memory held.
std::vector<Tensor> convolution_backward(const Tensor& x, const Tensor& weight, const Tensor& dout, int stride, bool input_gradient) {
  Tensor dx = paddle::empty(x.shape(), x.dtype(), x.place()), dweight = paddle::empty(weight.shape(), x.dtype(), x.place());
  const int k = weight.shape()[2];
  PD_DISPATCH_FLOATING_TYPES(x.dtype(), "convolution_grad", [&] {
    const auto given = map_of(dout.data<data_t>(), dout.shape());
    if (input_gradient) halo::input_gradient(weight.data<data_t>(), k, stride, given, map_of(dx.data<data_t>(), x.shape()));
    halo::weight_gradient(map_of(x.data<data_t>(), x.shape()), k, stride, given, dweight.data<data_t>());
  });
  return {dx, dweight};
}

template <class T>
halo::Norm<T> norm_of(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& variance, float epsilon, int act) {
  return {weight.data<T>(), bias.data<T>(), mean.data<T>(), variance.data<T>(), static_cast<T>(epsilon),
          static_cast<halo::Activation>(act)};
}

std::vector<Dims> infer_inference_shape(const Dims& x, const Dims& weight, const Dims&, const Dims&, const Dims&, const Dims&,
                                        const paddle::optional<Dims>&, int stride, float, int) {
  return infer_convolution_shape(x, weight, stride, false);
}

std::vector<paddle::DataType> infer_inference_dtype(const paddle::DataType& x, const paddle::DataType&, const paddle::DataType&,
                                                    const paddle::DataType&, const paddle::DataType&, const paddle::DataType&,
                                                    const paddle::optional<paddle::DataType>&) {
  return {x};
}

std::vector<Tensor> convolution_norm_act(const Tensor& x, const Tensor& weight, const Tensor& norm_weight, const Tensor& norm_bias,
                                         const Tensor& mean, const Tensor& variance, const paddle::optional<Tensor>& residual,
                                         int stride, float epsilon, int act) {
  check_convolution(x, weight, stride);
  const Dims channels{weight.shape()[0]}, shape = infer_convolution_shape(x.shape(), weight.shape(), stride, false)[0];
  for (const Tensor* part : {&norm_weight, &norm_bias, &mean, &variance})
    PD_CHECK(part->shape() == channels && part->dtype() == x.dtype(), "convolution_norm_act: the norm must be (O,) and of x's dtype");
  PD_CHECK(!residual || residual->shape() == shape && residual->dtype() == x.dtype(),
           "convolution_norm_act: the residual must be like the result");
  PD_CHECK(act >= 0 && act <= 2, "convolution_norm_act: act must be 0, 1 or 2");
  Tensor out = paddle::empty(shape, x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.dtype(), "convolution_norm_act", [&] {
    const auto norm = norm_of<data_t>(norm_weight, norm_bias, mean, variance, epsilon, act);
    std::vector<data_t> scale, shift;
    for (int c = 0; c < channels[0]; ++c) {
      scale.push_back(norm.scale(c));
      shift.push_back(norm.bias[c] - norm.mean[c] * scale[c]);
    }
    const halo::Finish<data_t> finish{scale.data(), shift.data(), residual ? residual->data<data_t>() : nullptr, norm.act};
    halo::convolution(map_of(x.data<data_t>(), x.shape()), weight.data<data_t>(), static_cast<int>(weight.shape()[2]), stride,
                      map_of(out.data<data_t>(), shape), &finish);
  });
  return {out};
}

void check_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int act) {
  PD_CHECK(x.is_cpu() && weight.is_cpu() && bias.is_cpu() && x.dtype() == weight.dtype() && x.dtype() == bias.dtype(),
           "batch_norm_act: needs CPU tensors of one dtype");
  PD_CHECK(x.shape().size() == 4 && weight.shape() == Dims({x.shape()[1]}) && bias.shape() == weight.shape() && act >= 0 && act <= 2,
           "batch_norm_act: x must be (B, C, H, W), weight and bias (C,), act 0, 1 or 2");
}

halo::Channels channels_of(const Dims& x) {
  return {static_cast<int>(x[0]), static_cast<int>(x[1]), static_cast<int>(x[2] * x[3])};
}

std::vector<Tensor> norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, float epsilon, int act) {
  check_norm(x, weight, bias, act);
  Tensor out = paddle::empty(x.shape(), x.dtype(), x.place()), mean = paddle::empty(weight.shape(), x.dtype(), x.place()),
         variance = paddle::empty(weight.shape(), x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.dtype(), "batch_norm_act", [&] {
    halo::statistics(channels_of(x.shape()), x.data<data_t>(), mean.data<data_t>(), variance.data<data_t>());
    halo::batch_norm(channels_of(x.shape()), x.data<data_t>(), norm_of<data_t>(weight, bias, mean, variance, epsilon, act),
                     out.data<data_t>());
  });
  return {out, mean, variance};
}

std::vector<Tensor> norm_backward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                  const Tensor& variance, const Tensor& dout, float epsilon, int act) {
  Tensor dx = paddle::empty(x.shape(), x.dtype(), x.place()), dweight = paddle::empty(weight.shape(), x.dtype(), x.place()),
         dbias = paddle::empty(weight.shape(), x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.dtype(), "batch_norm_act_grad", [&] {
    halo::batch_norm_backward(channels_of(x.shape()), x.data<data_t>(), norm_of<data_t>(weight, bias, mean, variance, epsilon, act),
                              dout.data<data_t>(), dx.data<data_t>(), dweight.data<data_t>(), dbias.data<data_t>());
  });
  return {dx, dweight, dbias};
}

std::vector<Dims> infer_norm_shape(const Dims& x, const Dims& weight, const Dims&, float, int) { return {x, weight, weight}; }

std::vector<Dims> infer_norm_grad_shape(const Dims& x, const Dims& weight, const Dims&, const Dims&, const Dims&, const Dims&, float,
                                        int) {
  return {x, weight, weight};
}

std::vector<paddle::DataType> infer_norm_dtype(const paddle::DataType& x, const paddle::DataType&, const paddle::DataType&) {
  return {x, x, x};
}

void check_pool(const Tensor& x) {
  PD_CHECK(x.is_cpu() && x.shape().size() == 4, "max_pool: x must be (B, C, H, W), on a CPU");
}

std::vector<Dims> infer_pool_shape(const Dims& x) {
  const auto half = [](int64_t n) { return n < 0 ? n : (n + 1) / 2; };
  return {{x[0], x[1], half(x[2]), half(x[3])}};
}

std::vector<Dims> infer_pool_grad_shape(const Dims& x, const Dims&) { return {x}; }

std::vector<paddle::DataType> infer_pool_dtype(const paddle::DataType& x) { return {x}; }

std::vector<Tensor> pool_forward(const Tensor& x) {
  check_pool(x);
  Tensor out = paddle::empty(infer_pool_shape(x.shape())[0], x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.dtype(), "max_pool", [&] {
    halo::max_pool(map_of(x.data<data_t>(), x.shape()), map_of(out.data<data_t>(), out.shape()));
  });
  return {out};
}

std::vector<Tensor> pool_backward(const Tensor& x, const Tensor& dout) {
  Tensor dx = paddle::empty(x.shape(), x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.dtype(), "max_pool_grad", [&] {
    halo::max_pool_gradient(map_of(x.data<data_t>(), x.shape()), map_of(dout.data<data_t>(), dout.shape()),
                            map_of(dx.data<data_t>(), x.shape()));
  });
  return {dx};
}

// Paddle calls this for the gradient of a gradient. Without it that would be None, and no error.
std::vector<Tensor> refuse_second_derivative(const Tensor&) {
  PD_THROW("the compiled operators have no second derivatives. MODEL.ATTENTION composed, or layers.use_operators(model, "
           "'composed'), takes Paddle's operators: there convolution and batch norm in training have them; max pooling, "
           "softmax and einsum have none in Paddle 3.3.1");
}

std::vector<Dims> infer_refused_shape(const Dims& given) { return {given}; }

}  // namespace

#define REFUSE_SECOND_DERIVATIVE(op, output)                             \
  PD_BUILD_DOUBLE_GRAD_OP(op)                                            \
      .Inputs({paddle::Grad(output)})                                    \
      .Outputs({paddle::Grad(paddle::Grad(output))})                     \
      .SetKernelFn(PD_KERNEL(refuse_second_derivative))                  \
      .SetInferShapeFn(PD_INFER_SHAPE(infer_refused_shape))

PD_BUILD_OP(halo_attention)
    .Inputs({"Q", "KV", "HeightRel", "WidthRel"})
    .Outputs({"Out"})
    .Attrs({"num_heads: int", "block_size: int", "halo_size: int"})
    .SetKernelFn(PD_KERNEL(forward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_dtype));

PD_BUILD_GRAD_OP(halo_attention)
    .Inputs({"Q", "KV", "HeightRel", "WidthRel", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Q"), paddle::Grad("KV"), paddle::Grad("HeightRel"), paddle::Grad("WidthRel")})
    .Attrs({"num_heads: int", "block_size: int", "halo_size: int"})
    .SetKernelFn(PD_KERNEL(backward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_grad_shape));

PD_BUILD_OP(convolution)
    .Inputs({"X", "Weight"})
    .Outputs({"Out"})
    .Attrs({"stride: int", "input_gradient: bool"})
    .SetKernelFn(PD_KERNEL(convolution_forward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_convolution_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_convolution_dtype));

PD_BUILD_GRAD_OP(convolution)
    .Inputs({"X", "Weight", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight")})
    .Attrs({"stride: int", "input_gradient: bool"})
    .SetKernelFn(PD_KERNEL(convolution_backward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_convolution_grad_shape));

PD_BUILD_OP(convolution_norm_act)
    .Inputs({"X", "Weight", "NormWeight", "NormBias", "Mean", "Variance", paddle::Optional("Residual")})
    .Outputs({"Out"})
    .Attrs({"stride: int", "epsilon: float", "act: int"})
    .SetKernelFn(PD_KERNEL(convolution_norm_act))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_inference_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_inference_dtype));

PD_BUILD_OP(batch_norm_act)
    .Inputs({"X", "Weight", "Bias"})
    .Outputs({"Out", "Mean", "Variance"})
    .Attrs({"epsilon: float", "act: int"})
    .SetKernelFn(PD_KERNEL(norm_forward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_norm_dtype));

PD_BUILD_GRAD_OP(batch_norm_act)
    .Inputs({"X", "Weight", "Bias", "Mean", "Variance", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight"), paddle::Grad("Bias")})
    .Attrs({"epsilon: float", "act: int"})
    .SetKernelFn(PD_KERNEL(norm_backward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_norm_grad_shape));

PD_BUILD_OP(max_pool)
    .Inputs({"X"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(pool_forward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_pool_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_pool_dtype));

PD_BUILD_GRAD_OP(max_pool)
    .Inputs({"X", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(pool_backward))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_pool_grad_shape));

REFUSE_SECOND_DERIVATIVE(halo_attention, "Out");
REFUSE_SECOND_DERIVATIVE(convolution, "Out");
REFUSE_SECOND_DERIVATIVE(batch_norm_act, "Out");
REFUSE_SECOND_DERIVATIVE(max_pool, "Out");
