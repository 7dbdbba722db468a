// Batch norm with the statistics of the batch and the activation after it, on a CPU, forward and backward.
//
// A task is a channel, whose pixels mostly stay in the cache from one pass over them to the next. The backward pass computes the
// activation's input again from x; sums of a plane are added up in double precision.
#pragma once

#include "activation.h"

namespace halo {

// (B, C, pixels)
struct Channels {
  int B, C, pixels;

  size_t at(int b, int c) const { return (static_cast<size_t>(b) * C + c) * pixels; }
  double count() const { return static_cast<double>(B) * pixels; }
};

template <class T>
struct Norm {
  const T *weight, *bias, *mean, *variance;            // (C,) each
  T epsilon;
  Activation act;

  T deviation(int c) const { return std::sqrt(variance[c] + epsilon); }
  T scale(int c) const { return weight[c] / deviation(c); }
};

// Calls visit(place, lanes) for each vector of pixels of a channel in image b; the last may be part of one.
template <class T, class Visit>
void each_vector(const Channels& s, int b, int c, Visit visit) {
  for (int i = 0; i < s.pixels; i += kLanes<T>) visit(s.at(b, c) + i, part<T>(0, s.pixels - i));
}

template <class T>
double total(Vec<T> x) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}

// x -> mean and (biased) variance of each channel
template <class T>
void statistics(const Channels& s, const T* x, T* mean, T* variance) {
  static const std::vector<T> ones(kLanes<T>, T(1));
  parallel(s.C, [&] {
    return [&](int c) {
      double sum = 0, squares = 0;
      for (int b = 0; b < s.B; ++b) {
        Vec<T> plane{};
        each_vector<T>(s, b, c, [&](size_t i, Part lanes) { plane += load(x + i, lanes); });
        sum += total<T>(plane);
      }
      mean[c] = static_cast<T>(sum / s.count());
      for (int b = 0; b < s.B; ++b) {
        Vec<T> plane{};
        each_vector<T>(s, b, c, [&](size_t i, Part lanes) {
          const Vec<T> centred = (load(x + i, lanes) - mean[c]) * load(ones.data(), lanes);
          plane += centred * centred;
        });
        squares += total<T>(plane);
      }
      variance[c] = static_cast<T>(squares / s.count());
    };
  });
}

template <class T>
void batch_norm(const Channels& s, const T* x, const Norm<T>& norm, T* out) {
  parallel(s.C, [&] {
    return [&](int c) {
      const T scale = norm.scale(c), mean = norm.mean[c], bias = norm.bias[c];
      for (int b = 0; b < s.B; ++b)
        each_vector<T>(s, b, c, [&](size_t i, Part lanes) {
          store(out + i, activate<T>((load(x + i, lanes) - mean) * scale + bias, norm.act), lanes);
        });
    };
  });
}

// dout -> dx, and dweight and dbias (C,), through the statistics too
template <class T>
void batch_norm_backward(const Channels& s, const T* x, const Norm<T>& norm, const T* dout, T* dx, T* dweight, T* dbias) {
  parallel(s.C, [&] {
    return [&](int c) {
      const T scale = norm.scale(c), mean = norm.mean[c], bias = norm.bias[c], deviation = norm.deviation(c);
      double sum = 0, product = 0;                     // of the gradient, and of it with the normalised x
      for (int b = 0; b < s.B; ++b) {
        Vec<T> plane{}, plane_product{};
        each_vector<T>(s, b, c, [&](size_t i, Part lanes) {
          const Vec<T> centred = load(x + i, lanes) - mean;
          const Vec<T> gradient = activate_gradient<T>(centred * scale + bias, load(dout + i, lanes), norm.act);
          plane += gradient;
          plane_product += gradient * centred;
        });
        sum += total<T>(plane);
        product += total<T>(plane_product) / deviation;
      }
      dbias[c] = static_cast<T>(sum);
      dweight[c] = static_cast<T>(product);
      const T from_mean = static_cast<T>(sum / s.count()), from_variance = static_cast<T>(product / s.count() / deviation);
      for (int b = 0; b < s.B; ++b)
        each_vector<T>(s, b, c, [&](size_t i, Part lanes) {
          const Vec<T> centred = load(x + i, lanes) - mean;
          const Vec<T> gradient = activate_gradient<T>(centred * scale + bias, load(dout + i, lanes), norm.act);
          store(dx + i, (gradient - from_mean - centred * from_variance) * scale, lanes);
        });
    };
  });
}

}  // namespace halo
