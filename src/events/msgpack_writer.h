// Appends MessagePack to a string, each value in its shortest form.
//
// An array or map is its header followed by as many values (a map: keys and values by turns) as the header says; that
// they do follow is the caller's business.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvrouter {

class MsgpackWriter {
 public:
  explicit MsgpackWriter(std::string& out) : out_(out) {}

  void nil() { byte(0xc0); }
  void boolean(bool value) { byte(value ? 0xc3 : 0xc2); }
  void uint(std::uint64_t value) {
    if (value < 0x80) {
      byte(static_cast<std::uint8_t>(value));
    } else if (value <= 0xff) {
      tagged(0xcc, value, 1);
    } else if (value <= 0xffff) {
      tagged(0xcd, value, 2);
    } else if (value <= 0xffffffff) {
      tagged(0xce, value, 4);
    } else {
      tagged(0xcf, value, 8);
    }
  }
  void integer(std::int64_t value) {
    const auto bits = static_cast<std::uint64_t>(value);
    if (value >= 0) {
      uint(bits);
    } else if (value >= -32) {
      byte(static_cast<std::uint8_t>(bits));
    } else if (value >= INT8_MIN) {
      tagged(0xd0, bits, 1);
    } else if (value >= INT16_MIN) {
      tagged(0xd1, bits, 2);
    } else if (value >= INT32_MIN) {
      tagged(0xd2, bits, 4);
    } else {
      tagged(0xd3, bits, 8);
    }
  }
  void float64(double value) { tagged(0xcb, std::bit_cast<std::uint64_t>(value), 8); }
  // Lengths up to 2^32 - 1.
  void str(std::string_view value) {
    if (value.size() < 32) {
      byte(static_cast<std::uint8_t>(0xa0 | value.size()));
    } else {
      length(0xd9, value.size(), true);
    }
    out_.append(value);
  }
  void bin(std::string_view value) {
    length(0xc4, value.size(), true);
    out_.append(value);
  }
  void array(std::size_t count) { container(0x90, 0xdc, count); }
  void map(std::size_t count) { container(0x80, 0xde, count); }

 private:
  void byte(std::uint8_t value) { out_.push_back(static_cast<char>(value)); }
  void tagged(std::uint8_t tag, std::uint64_t value, int bytes) {
    byte(tag);
    for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) byte(static_cast<std::uint8_t>(value >> shift));
  }
  // Three tags in a row, for lengths of 1, 2 and 4 bytes; or two, for 2 and 4.
  void length(std::uint8_t tag, std::size_t count, bool has_one_byte_form) {
    if (has_one_byte_form && count <= 0xff) return tagged(tag, count, 1);
    if (has_one_byte_form) ++tag;
    if (count <= 0xffff) return tagged(tag, count, 2);
    tagged(static_cast<std::uint8_t>(tag + 1), count, 4);
  }
  void container(std::uint8_t short_tag, std::uint8_t long_tag, std::size_t count) {
    if (count < 16) return byte(static_cast<std::uint8_t>(short_tag | count));
    length(long_tag, count, false);
  }

  std::string& out_;
};

}  // namespace kvrouter
