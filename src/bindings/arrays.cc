#include "bindings/arrays.h"

#include <string>
#include <type_traits>
#include <utility>

#if PY_VERSION_HEX < 0x030B0000
#include <longintrepr.h>
#endif

namespace kvrouter::python {
namespace {

[[noreturn]] void bad_type(const std::string& what) {
  throw nb::type_error((what + " must be a list or a one-dimensional integer array on the CPU").c_str());
}

[[noreturn]] void out_of_range(const char* what, std::size_t position, const char* range) {
  throw nb::value_error(
      (std::string(what) + ": the value at position " + std::to_string(position) + " is out of range (" + range + ")")
          .c_str());
}

bool is_integer(nb::dlpack::dtype type) {
  const auto code = static_cast<nb::dlpack::dtype_code>(type.code);
  return (code == nb::dlpack::dtype_code::Int || code == nb::dlpack::dtype_code::UInt) && type.lanes == 1;
}

AnyArray as_array(nb::handle object, const char* what) {
  AnyArray array;
  if (!nb::try_cast(object, array, false) || !is_integer(array.dtype())) bad_type(what);
  return array;
}

// Elements somewhere in an array.
struct Elements {
  const void* data;
  nb::dlpack::dtype type;
  std::size_t size;
  std::int64_t stride;  // in elements
};

Elements elements_of(const AnyArray& array) {
  return {array.data(), array.dtype(), array.shape(0), array.stride(0)};
}

// The first `size` elements of a row.
Elements elements_of_row(const AnyMatrix& matrix, std::size_t row, std::size_t size) {
  const std::int64_t offset = static_cast<std::int64_t>(row) * matrix.stride(0) * (matrix.dtype().bits / 8);
  return {static_cast<const std::byte*>(matrix.data()) + offset, matrix.dtype(), size, matrix.stride(1)};
}

// Calls visit(pointer, stride) with the elements' type.
template <typename Visitor>
void visit_elements(const Elements& elements, Visitor&& visit) {
  const bool is_signed = static_cast<nb::dlpack::dtype_code>(elements.type.code) == nb::dlpack::dtype_code::Int;
  const void* data = elements.data;
  const std::int64_t stride = elements.stride;
  switch (elements.type.bits) {
    case 8:
      return is_signed ? visit(static_cast<const std::int8_t*>(data), stride)
                       : visit(static_cast<const std::uint8_t*>(data), stride);
    case 16:
      return is_signed ? visit(static_cast<const std::int16_t*>(data), stride)
                       : visit(static_cast<const std::uint16_t*>(data), stride);
    case 32:
      return is_signed ? visit(static_cast<const std::int32_t*>(data), stride)
                       : visit(static_cast<const std::uint32_t*>(data), stride);
    default:
      return is_signed ? visit(static_cast<const std::int64_t*>(data), stride)
                       : visit(static_cast<const std::uint64_t*>(data), stride);
  }
}

// True if a T can hold every value whose bits are in `bits` (the values' bits, or-ed).
template <typename T, typename Element>
bool all_fit(std::make_unsigned_t<Element> bits) {
  if (std::is_signed_v<Element> && static_cast<Element>(bits) < 0) return false;
  return std::in_range<T>(bits);
}

// The elements as T.  Contiguous elements of T's width are used in place.  The range is checked over all elements at
// once, which compilers turn into vector code; which one was out of range is looked for only then.
template <typename T>
std::span<const T> narrow(const Elements& elements, std::vector<T>& buffer, const char* what, const char* range) {
  std::span<const T> result;
  const std::size_t size = elements.size;
  visit_elements(elements, [&](const auto* data, std::int64_t stride) {
    using Element = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    using Bits = std::make_unsigned_t<Element>;
    Bits bits = 0;
    if (sizeof(Element) == sizeof(T) && stride == 1) {
      for (std::size_t i = 0; i < size; ++i) bits |= static_cast<Bits>(data[i]);
      result = {reinterpret_cast<const T*>(data), size};
    } else {
      buffer.resize(size);
      if (stride == 1) {
        for (std::size_t i = 0; i < size; ++i) {
          bits |= static_cast<Bits>(data[i]);
          buffer[i] = static_cast<T>(data[i]);
        }
      } else {
        for (std::size_t i = 0; i < size; ++i) {
          const Element value = data[static_cast<std::int64_t>(i) * stride];
          bits |= static_cast<Bits>(value);
          buffer[i] = static_cast<T>(value);
        }
      }
      result = buffer;
    }
    if (all_fit<T, Element>(bits)) return;
    std::size_t bad = 0;
    while (std::in_range<T>(data[static_cast<std::int64_t>(bad) * stride])) ++bad;
    out_of_range(what, bad, range);
  });
  return result;
}

// The value of an integer object of one digit (below 2^30), which most token ids are; false for others.
bool read_small(PyObject* item, std::uint32_t& value) {
#if PY_VERSION_HEX >= 0x030C0000
  auto* number = reinterpret_cast<PyLongObject*>(item);
  if (!PyUnstable_Long_IsCompact(number)) return false;
  const Py_ssize_t compact = PyUnstable_Long_CompactValue(number);
  if (compact < 0) return false;
  value = static_cast<std::uint32_t>(compact);
  return true;
#else
  const Py_ssize_t digits = Py_SIZE(item);
  if (digits != 0 && digits != 1) return false;
  value = digits ? reinterpret_cast<PyLongObject*>(item)->ob_digit[0] : 0;
  return true;
#endif
}

// True if `object` was a list or tuple, which is then in `buffer`.
template <typename T>
bool read_list(nb::handle object, std::vector<T>& buffer, const char* what, const char* range) {
  if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr())) return false;
  const auto size = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(object.ptr()));
  buffer.resize(size);
  for (std::size_t i = 0; i < size; ++i) {
    // Asked for anew each time: __index__ of an item may be code of anybody's, and change the list.
    if (i >= static_cast<std::size_t>(PySequence_Fast_GET_SIZE(object.ptr()))) bad_type(what);
    PyObject* item = PySequence_Fast_ITEMS(object.ptr())[i];
    if (std::uint32_t small = 0; PyLong_CheckExact(item) && read_small(item, small)) {
      buffer[i] = static_cast<T>(small);
      continue;
    }
    nb::object index;  // NumPy and torch scalars in a list are integers by __index__
    if (!PyLong_Check(item)) {
      index = nb::steal(PyNumber_Index(item));
      if (!index.is_valid()) {
        PyErr_Clear();
        bad_type(what);
      }
      item = index.ptr();
    }
    const unsigned long long value = PyLong_AsUnsignedLongLong(item);
    if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) {
      PyErr_Clear();
      out_of_range(what, i, range);
    }
    if (!std::in_range<T>(value)) out_of_range(what, i, range);
    buffer[i] = static_cast<T>(value);
  }
  return true;
}

constexpr const char* kTokenRange = "0 to 2^32 - 1";

}  // namespace

TokenView::TokenView(nb::handle tokens) {
  if (read_list(tokens, buffer_, "tokens", kTokenRange)) {
    span_ = buffer_;
    return;
  }
  array_ = as_array(tokens, "tokens");
  span_ = narrow(elements_of(array_), buffer_, "tokens", kTokenRange);
}

TokenBatchView::TokenBatchView(nb::handle tokens, nb::handle lengths) {
  const bool is_list = PyList_Check(tokens.ptr()) || PyTuple_Check(tokens.ptr());
  if (!is_list && (!nb::try_cast(tokens, matrix_, false) || !is_integer(matrix_.dtype()))) {
    throw nb::type_error("tokens must be a two-dimensional integer array on the CPU or a list of sequences");
  }
  const std::size_t count = is_list ? nb::len(tokens) : matrix_.shape(0);
  std::vector<std::uint64_t> given;
  if (!lengths.is_none()) {
    given = read_counts(lengths, "lengths");
    if (given.size() != count) {
      throw nb::value_error(("lengths has " + std::to_string(given.size()) + " entries, tokens has " +
                             std::to_string(count) + " requests")
                                .c_str());
    }
  }
  const auto length_of = [&](std::size_t i, std::size_t whole) {
    const std::size_t length = given.empty() ? whole : given[i];
    if (length == 0 || length > whole) {
      throw nb::value_error(("request " + std::to_string(i) + " of the batch: its length must be from 1 to " +
                             std::to_string(whole) + ", got " + std::to_string(length))
                                .c_str());
    }
    return length;
  };
  spans_.reserve(count);
  if (is_list) {
    rows_.reserve(count);
    for (const nb::handle row : nb::borrow<nb::sequence>(tokens)) {
      if (rows_.size() == count) throw nb::value_error("tokens changed while it was read");
      const std::span<const TokenId> span = rows_.emplace_back(row).span();
      spans_.push_back(span.first(length_of(spans_.size(), span.size())));
    }
    if (rows_.size() != count) throw nb::value_error("tokens changed while it was read");
    return;
  }
  buffers_.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t length = length_of(i, matrix_.shape(1));
    spans_.push_back(narrow(elements_of_row(matrix_, i, length), buffers_[i], "tokens", kTokenRange));
  }
}

std::vector<std::uint64_t> read_counts(nb::handle values, const char* what) {
  constexpr const char* kRange = "1 to 2^63 - 1";
  std::vector<std::uint64_t> counts;
  if (!read_list(values, counts, what, kRange)) {
    const AnyArray array = as_array(values, what);
    std::vector<std::uint64_t> buffer;
    const std::span<const std::uint64_t> span = narrow(elements_of(array), buffer, what, kRange);
    counts.assign(span.begin(), span.end());
  }
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] == 0 || counts[i] >> 63 != 0) out_of_range(what, i, kRange);
  }
  return counts;
}

HashView::HashView(nb::handle hashes, const char* what) {
  constexpr const char* kRange = "0 to 2^64 - 1";
  if (read_list(hashes, buffer_, what, kRange)) {
    span_ = buffer_;
    return;
  }
  array_ = as_array(hashes, what);
  if (array_.dtype().bits == 64 && array_.stride(0) == 1) {  // torch has no uint64 arithmetic: the bits count
    span_ = {static_cast<const std::uint64_t*>(array_.data()), array_.shape(0)};
  } else {
    span_ = narrow(elements_of(array_), buffer_, what, kRange);
  }
}

WorkerId checked_worker(std::size_t num_workers, std::int64_t worker) {
  if (worker < 0 || static_cast<std::size_t>(worker) >= num_workers) {
    throw nb::value_error(("worker must be from 0 to " + std::to_string(num_workers - 1)).c_str());
  }
  return static_cast<WorkerId>(worker);
}

}  // namespace kvrouter::python
