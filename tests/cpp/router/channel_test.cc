#include "router/channel.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <optional>

#include "router/fake_publisher.h"

namespace kvrouter {
namespace {

std::ptrdiff_t open_descriptors() {
  const std::filesystem::directory_iterator begin("/proc/self/fd");
  return std::distance(begin, {});
}

// libzmq 4.3.4 never frees a socket that is closed just when its connection breaks, if it is being watched.
TEST(Channel, ClosedAsItsPublisherDies_FreesItsSockets) {
  zmq::context_t publishers, context;
  std::ptrdiff_t settled = 0;
  for (std::size_t i = 0; i < 20; ++i) {
    std::optional<testing::Publisher> publisher(publishers);
    std::optional<Channel> channel(std::in_place, context, Channel::Kind::kKvEvents, publisher->endpoint(), i);
    ASSERT_TRUE(testing::eventually([&] {
      channel->update();
      return channel->connected();
    }));
    publisher.reset();
    channel.reset();
    if (i == 4) settled = open_descriptors();
  }
  EXPECT_TRUE(testing::eventually([&] { return open_descriptors() <= settled + 6; })) << open_descriptors();
}

}  // namespace
}  // namespace kvrouter
