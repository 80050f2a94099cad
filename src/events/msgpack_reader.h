// A MessagePack pull reader over a byte range: no allocation, no recursion, every read checked against the end.
//
// Reads return false (and leave fail() set) on a value of another type or on truncated input; after that the reader
// stays failed.  Why not a parser with a visitor: an event's fields are needed in the order of the schema, not of the
// bytes, and pulling them keeps the decoder straight-line code.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>

namespace kvrouter {

enum class MsgpackType { kNil, kBool, kInt, kFloat, kString, kBinary, kArray, kMap, kExt, kInvalid };

class MsgpackReader {
 public:
  explicit MsgpackReader(std::span<const std::byte> data)
      : begin_(reinterpret_cast<const std::uint8_t*>(data.data())), p_(begin_), end_(begin_ + data.size()) {}

  bool failed() const { return failed_; }
  std::size_t position() const { return static_cast<std::size_t>(p_ - begin_); }
  std::size_t remaining() const { return static_cast<std::size_t>(end_ - p_); }

  // Type of the next value; kInvalid at the end and for the reserved byte.
  MsgpackType peek() const;

  bool read_nil();
  bool read_bool(bool& out);
  // Any integer that fits; a negative one fails the unsigned read.
  bool read_uint(std::uint64_t& out);
  bool read_int(std::int64_t& out);
  // A float, or an integer as one.
  bool read_double(double& out);
  bool read_string(std::string_view& out);
  bool read_binary(std::string_view& out);
  // A header whose count could not fit into the remaining bytes fails.
  bool read_array(std::size_t& count);
  bool read_map(std::size_t& count);
  // Passes over one whole value, however deep.
  bool skip();

 private:
  bool fail() {
    failed_ = true;
    return false;
  }
  // Big-endian unsigned of sizeof(T) bytes at p_ + 1; moves past it.
  template <typename T>
  bool read_big_endian(T& out) {
    if (remaining() < 1 + sizeof(T)) return fail();
    T value;
    std::memcpy(&value, p_ + 1, sizeof(T));
    if constexpr (sizeof(T) == 2) value = __builtin_bswap16(value);
    if constexpr (sizeof(T) == 4) value = __builtin_bswap32(value);
    if constexpr (sizeof(T) == 8) value = __builtin_bswap64(value);
    out = value;
    p_ += 1 + sizeof(T);
    return true;
  }
  // After a length was read: the bytes themselves.
  bool take(std::size_t size, std::string_view& out) {
    if (size > remaining()) return fail();
    out = {reinterpret_cast<const char*>(p_), size};
    p_ += size;
    return true;
  }
  template <typename T>
  bool take_sized(std::string_view& out) {
    T size = 0;
    return read_big_endian(size) && take(size, out);
  }
  template <typename T>
  bool read_count(std::size_t& count) {
    T size = 0;
    if (!read_big_endian(size)) return false;
    count = size;
    return true;
  }

  const std::uint8_t* begin_;
  const std::uint8_t* p_;
  const std::uint8_t* end_;
  bool failed_ = false;
};

inline MsgpackType MsgpackReader::peek() const {
  if (failed_ || p_ == end_) return MsgpackType::kInvalid;
  const std::uint8_t b = *p_;
  if (b <= 0x7f || b >= 0xe0) return MsgpackType::kInt;
  if (b <= 0x8f) return MsgpackType::kMap;
  if (b <= 0x9f) return MsgpackType::kArray;
  if (b <= 0xbf) return MsgpackType::kString;
  switch (b) {
    case 0xc0:
      return MsgpackType::kNil;
    case 0xc2:
    case 0xc3:
      return MsgpackType::kBool;
    case 0xc4:
    case 0xc5:
    case 0xc6:
      return MsgpackType::kBinary;
    case 0xca:
    case 0xcb:
      return MsgpackType::kFloat;
    case 0xd9:
    case 0xda:
    case 0xdb:
      return MsgpackType::kString;
    case 0xdc:
    case 0xdd:
      return MsgpackType::kArray;
    case 0xde:
    case 0xdf:
      return MsgpackType::kMap;
    default:
      break;
  }
  if (b >= 0xcc && b <= 0xd3) return MsgpackType::kInt;
  if ((b >= 0xc7 && b <= 0xc9) || (b >= 0xd4 && b <= 0xd8)) return MsgpackType::kExt;
  return MsgpackType::kInvalid;  // 0xc1
}

inline bool MsgpackReader::read_nil() {
  if (peek() != MsgpackType::kNil) return fail();
  ++p_;
  return true;
}

inline bool MsgpackReader::read_bool(bool& out) {
  if (peek() != MsgpackType::kBool) return fail();
  out = *p_ == 0xc3;
  ++p_;
  return true;
}

inline bool MsgpackReader::read_uint(std::uint64_t& out) {
  if (failed_ || p_ == end_) return fail();
  const std::uint8_t b = *p_;
  if (b <= 0x7f) {
    out = b;
    ++p_;
    return true;
  }
  switch (b) {
    case 0xcc: {
      std::uint8_t v = 0;
      if (!read_big_endian(v)) return false;
      out = v;
      return true;
    }
    case 0xcd: {
      std::uint16_t v = 0;
      if (!read_big_endian(v)) return false;
      out = v;
      return true;
    }
    case 0xce: {
      std::uint32_t v = 0;
      if (!read_big_endian(v)) return false;
      out = v;
      return true;
    }
    case 0xcf:
      return read_big_endian(out);
    default:
      break;
  }
  std::int64_t v = 0;
  if (!read_int(v)) return false;
  if (v < 0) return fail();
  out = static_cast<std::uint64_t>(v);
  return true;
}

inline bool MsgpackReader::read_int(std::int64_t& out) {
  if (peek() != MsgpackType::kInt) return fail();
  const std::uint8_t b = *p_;
  if (b <= 0x7f || b >= 0xe0) {
    out = static_cast<std::int8_t>(b);
    ++p_;
    return true;
  }
  const auto sign_extended = [&](auto raw) {
    if (!read_big_endian(raw)) return false;
    out = static_cast<std::make_signed_t<decltype(raw)>>(raw);
    return true;
  };
  switch (b) {
    case 0xd0:
      return sign_extended(std::uint8_t{});
    case 0xd1:
      return sign_extended(std::uint16_t{});
    case 0xd2:
      return sign_extended(std::uint32_t{});
    case 0xd3:
      return sign_extended(std::uint64_t{});
    default:
      break;
  }
  std::uint64_t v = 0;
  if (!read_uint(v)) return false;
  if (v > static_cast<std::uint64_t>(INT64_MAX)) return fail();
  out = static_cast<std::int64_t>(v);
  return true;
}

inline bool MsgpackReader::read_double(double& out) {
  if (peek() == MsgpackType::kInt) {
    std::int64_t v = 0;
    if (!read_int(v)) return false;
    out = static_cast<double>(v);
    return true;
  }
  if (peek() != MsgpackType::kFloat) return fail();
  if (*p_ == 0xca) {
    std::uint32_t bits = 0;
    if (!read_big_endian(bits)) return false;
    out = std::bit_cast<float>(bits);
    return true;
  }
  std::uint64_t bits = 0;
  if (!read_big_endian(bits)) return false;
  out = std::bit_cast<double>(bits);
  return true;
}

inline bool MsgpackReader::read_string(std::string_view& out) {
  if (peek() != MsgpackType::kString) return fail();
  switch (*p_) {
    case 0xd9:
      return take_sized<std::uint8_t>(out);
    case 0xda:
      return take_sized<std::uint16_t>(out);
    case 0xdb:
      return take_sized<std::uint32_t>(out);
    default:
      break;
  }
  const std::size_t size = *p_++ & 0x1f;
  return take(size, out);
}

inline bool MsgpackReader::read_binary(std::string_view& out) {
  if (peek() != MsgpackType::kBinary) return fail();
  switch (*p_) {
    case 0xc4:
      return take_sized<std::uint8_t>(out);
    case 0xc5:
      return take_sized<std::uint16_t>(out);
    default:
      return take_sized<std::uint32_t>(out);
  }
}

inline bool MsgpackReader::read_array(std::size_t& count) {
  if (peek() != MsgpackType::kArray) return fail();
  bool ok = true;
  switch (*p_) {
    case 0xdc:
      ok = read_count<std::uint16_t>(count);
      break;
    case 0xdd:
      ok = read_count<std::uint32_t>(count);
      break;
    default:
      count = *p_++ & 0x0f;
  }
  // Every element takes a byte at least, so a count beyond that is a lie, told to make the reader allocate.
  return ok && (count <= remaining() || fail());
}

inline bool MsgpackReader::read_map(std::size_t& count) {
  if (peek() != MsgpackType::kMap) return fail();
  bool ok = true;
  switch (*p_) {
    case 0xde:
      ok = read_count<std::uint16_t>(count);
      break;
    case 0xdf:
      ok = read_count<std::uint32_t>(count);
      break;
    default:
      count = *p_++ & 0x0f;
  }
  return ok && (count <= remaining() / 2 || fail());
}

inline bool MsgpackReader::skip() {
  std::string_view bytes;
  // Values still to pass over; containers add to it, so depth costs nothing.  It cannot overflow: each container adds
  // at most as many values as bytes remain.
  std::uint64_t pending = 1;
  while (pending > 0) {
    --pending;
    std::size_t count = 0;
    switch (peek()) {
      case MsgpackType::kNil:
      case MsgpackType::kBool:
        ++p_;
        break;
      case MsgpackType::kInt: {
        const std::uint8_t b = *p_;
        const std::size_t size = (b <= 0x7f || b >= 0xe0) ? 1 : std::size_t{1} + (std::size_t{1} << ((b - 0xcc) & 3));
        if (size > remaining()) return fail();
        p_ += size;
        break;
      }
      case MsgpackType::kFloat: {
        const std::size_t size = *p_ == 0xca ? 5 : 9;
        if (size > remaining()) return fail();
        p_ += size;
        break;
      }
      case MsgpackType::kString:
        if (!read_string(bytes)) return false;
        break;
      case MsgpackType::kBinary:
        if (!read_binary(bytes)) return false;
        break;
      case MsgpackType::kArray:
        if (!read_array(count)) return false;
        pending += count;
        break;
      case MsgpackType::kMap:
        if (!read_map(count)) return false;
        pending += 2 * std::uint64_t{count};
        break;
      case MsgpackType::kExt: {
        const std::uint8_t b = *p_;
        std::size_t size = 0;  // of the data, which the type byte precedes
        if (b >= 0xd4) {
          size = std::size_t{1} << (b - 0xd4);
          ++p_;
        } else if (!(b == 0xc7   ? read_count<std::uint8_t>(size)
                     : b == 0xc8 ? read_count<std::uint16_t>(size)
                                 : read_count<std::uint32_t>(size))) {
          return false;
        }
        if (size >= remaining()) return fail();
        p_ += size + 1;
        break;
      }
      case MsgpackType::kInvalid:
        return fail();
    }
  }
  return true;
}

}  // namespace kvrouter
