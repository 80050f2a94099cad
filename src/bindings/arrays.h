// Python sequences as spans: lists and tuples are read element by element, NumPy arrays, CPU torch tensors and
// anything else with the buffer protocol or DLPack in place.
//
// A view keeps the array alive, so that the interpreter's lock may be released while the span is in use.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <span>
#include <vector>

#include "kvrouter/block_hash.h"
#include "kvrouter/prefix_index.h"

namespace kvrouter::python {

namespace nb = nanobind;
using AnyArray = nb::ndarray<nb::ro, nb::ndim<1>, nb::device::cpu>;
using AnyMatrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;

// 32-bit token ids.  uint32 and int32 arrays are used where they lie; 64-bit and smaller ones are narrowed into a
// buffer of the view's.
class __attribute__((visibility("hidden"))) TokenView {
 public:
  // Throws nb::type_error for what is no one-dimensional sequence of integers, nb::value_error for an id outside
  // [0, 2^32).
  explicit TokenView(nb::handle tokens);
  std::span<const TokenId> span() const { return span_; }

 private:
  AnyArray array_;
  std::vector<TokenId> buffer_;
  std::span<const TokenId> span_;
};

// 64-bit hashes: uint64 arrays where they lie, int64 ones reinterpreted.
class __attribute__((visibility("hidden"))) HashView {
 public:
  // `what` names the argument in errors.  Throws as TokenView does, for values outside [0, 2^64).
  HashView(nb::handle hashes, const char* what);
  std::span<const std::uint64_t> span() const { return span_; }

 private:
  AnyArray array_;
  std::vector<std::uint64_t> buffer_;
  std::span<const std::uint64_t> span_;
};

// The token ids of a batch of requests: a two-dimensional array whose rows are requests, or a list of sequences.
class __attribute__((visibility("hidden"))) TokenBatchView {
 public:
  // `lengths`: tokens of each request, without its padding at the end; None: all of them.  What the padding of a
  // two-dimensional array holds does not matter.  Throws as TokenView does, and nb::value_error for lengths that do
  // not fit.
  TokenBatchView(nb::handle tokens, nb::handle lengths);
  std::span<const std::span<const TokenId>> spans() const { return spans_; }

 private:
  AnyMatrix matrix_;
  std::vector<std::vector<TokenId>> buffers_;
  std::vector<TokenView> rows_;
  std::vector<std::span<const TokenId>> spans_;
};

// Positive integers of a one-dimensional sequence, e.g. lengths.  Throws as TokenView does.
std::vector<std::uint64_t> read_counts(nb::handle values, const char* what);

// `worker` as an id.  Throws nb::value_error unless it is one of `num_workers`.
WorkerId checked_worker(std::size_t num_workers, std::int64_t worker);

// A NumPy array that owns `values`.
template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> to_numpy(std::vector<T> values) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(owned->data(), {owned->size()}, owner);
}

}  // namespace kvrouter::python
