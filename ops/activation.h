// The activations that follow a norm, and their gradients.
#pragma once

#include "simd.h"

namespace halo {

enum class Activation { kIdentity, kRelu, kSilu };

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp(x < 0 ? x : -x);                // of -|x|
  return (x < 0 ? e : fill(T(1))) / (e + 1);
}

// A NaN stays one.
template <class T>
inline Vec<T> activate(Vec<T> x, Activation act) {
  return act == Activation::kRelu ? maximum(Vec<T>{}, x) : act == Activation::kSilu ? x * sigmoid<T>(x) : x;
}

// gradient of activate() at x, times that of its result
template <class T>
inline Vec<T> activate_gradient(Vec<T> x, Vec<T> dout, Activation act) {
  if (act == Activation::kRelu) return x <= 0 ? Vec<T>{} : dout;
  if (act == Activation::kIdentity) return dout;
  const Vec<T> s = sigmoid<T>(x);
  return dout * s * (x * (1 - s) + 1);
}

}  // namespace halo
