#include "events/msgpack_writer.h"

#include <gtest/gtest.h>

namespace kvrouter {
namespace {

template <typename Write>
std::string bytes(Write write) {
  std::string out;
  MsgpackWriter writer(out);
  write(writer);
  return out;
}

using W = MsgpackWriter&;

TEST(MsgpackWriter, Integers_TakeTheirShortestForm) {
  const auto uint = [](std::uint64_t value) { return bytes([&](W w) { w.uint(value); }); };
  EXPECT_EQ(uint(0), std::string("\x00", 1));
  EXPECT_EQ(uint(127), "\x7f");
  EXPECT_EQ(uint(128), "\xcc\x80");
  EXPECT_EQ(uint(255), "\xcc\xff");
  EXPECT_EQ(uint(256), std::string("\xcd\x01\x00", 3));
  EXPECT_EQ(uint(65535), "\xcd\xff\xff");
  EXPECT_EQ(uint(65536), std::string("\xce\x00\x01\x00\x00", 5));
  EXPECT_EQ(uint(0xffffffff), "\xce\xff\xff\xff\xff");
  EXPECT_EQ(uint(0x100000000), std::string("\xcf\x00\x00\x00\x01\x00\x00\x00\x00", 9));
  EXPECT_EQ(uint(UINT64_MAX), "\xcf\xff\xff\xff\xff\xff\xff\xff\xff");

  const auto integer = [](std::int64_t value) { return bytes([&](W w) { w.integer(value); }); };
  EXPECT_EQ(integer(5), "\x05");
  EXPECT_EQ(integer(-1), "\xff");
  EXPECT_EQ(integer(-32), "\xe0");
  EXPECT_EQ(integer(-33), "\xd0\xdf");
  EXPECT_EQ(integer(-128), "\xd0\x80");
  EXPECT_EQ(integer(-129), "\xd1\xff\x7f");
  EXPECT_EQ(integer(-32769), "\xd2\xff\xff\x7f\xff");
  EXPECT_EQ(integer(INT64_MIN), std::string("\xd3\x80\x00\x00\x00\x00\x00\x00\x00", 9));
}

TEST(MsgpackWriter, Lengths_TakeTheirShortestForm) {
  const auto head = [](std::string text, std::size_t length) { return text.substr(0, text.size() - length); };
  const auto str = [&](std::size_t n) { return head(bytes([&](W w) { w.str(std::string(n, 'x')); }), n); };
  EXPECT_EQ(str(0), "\xa0");
  EXPECT_EQ(str(31), "\xbf");
  EXPECT_EQ(str(32), "\xd9\x20");
  EXPECT_EQ(str(255), "\xd9\xff");
  EXPECT_EQ(str(256), std::string("\xda\x01\x00", 3));
  EXPECT_EQ(str(65536), std::string("\xdb\x00\x01\x00\x00", 5));
  const auto bin = [&](std::size_t n) { return head(bytes([&](W w) { w.bin(std::string(n, 'x')); }), n); };
  EXPECT_EQ(bin(0), std::string("\xc4\x00", 2));
  EXPECT_EQ(bin(255), "\xc4\xff");
  EXPECT_EQ(bin(256), std::string("\xc5\x01\x00", 3));
  EXPECT_EQ(bin(65536), std::string("\xc6\x00\x01\x00\x00", 5));
  const auto array = [](std::size_t n) { return bytes([&](W w) { w.array(n); }); };
  EXPECT_EQ(array(15), "\x9f");
  EXPECT_EQ(array(16), std::string("\xdc\x00\x10", 3));
  EXPECT_EQ(array(65536), std::string("\xdd\x00\x01\x00\x00", 5));
  const auto map = [](std::size_t n) { return bytes([&](W w) { w.map(n); }); };
  EXPECT_EQ(map(15), "\x8f");
  EXPECT_EQ(map(16), std::string("\xde\x00\x10", 3));
  EXPECT_EQ(map(65536), std::string("\xdf\x00\x01\x00\x00", 5));
}

TEST(MsgpackWriter, OtherValues) {
  EXPECT_EQ(bytes([](W w) { w.nil(); }), "\xc0");
  EXPECT_EQ(bytes([](W w) { w.boolean(false); }), "\xc2");
  EXPECT_EQ(bytes([](W w) { w.boolean(true); }), "\xc3");
  EXPECT_EQ(bytes([](W w) { w.float64(-1.5); }), std::string("\xcb\xbf\xf8\x00\x00\x00\x00\x00\x00", 9));
}

}  // namespace
}  // namespace kvrouter
