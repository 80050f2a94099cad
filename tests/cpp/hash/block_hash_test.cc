#include "kvrouter/block_hash.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <vector>

namespace kvrouter {
namespace {

TEST(BlockHash, KnownVector) {
  const std::vector<TokenId> tokens = {1, 2, 3, 4};
  EXPECT_EQ(hash_block(tokens), 14643705804678351452ull);
}

TEST(BlockHash, LoraNamespace_KnownVector) {
  // Dynamo's runtime gives this for lora_name="a".
  const std::vector<TokenId> tokens = {1, 2, 3, 4};
  EXPECT_EQ(hash_block(tokens, lora_namespace("a")), 17680866786467819158ull);
  EXPECT_EQ(lora_namespace(""), 0u);
}

RC_GTEST_PROP(BlockHash, HashesOfASequence_AreThoseOfItsFullBlocks, (const std::vector<TokenId>& tokens)) {
  const auto block_size = *rc::gen::inRange<std::size_t>(1, 20);
  std::vector<LocalHash> hashes(tokens.size() / block_size);
  hash_blocks(tokens, block_size, 0, hashes);
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    const std::vector<TokenId> block(tokens.begin() + static_cast<std::ptrdiff_t>(i * block_size),
                                     tokens.begin() + static_cast<std::ptrdiff_t>((i + 1) * block_size));
    RC_ASSERT(hashes[i] == hash_block(block));
  }
}

TEST(NamespaceBuilder, NothingAdded_IsTheBase) {
  EXPECT_EQ(NamespaceBuilder(42).finish(), 42u);
}

TEST(NamespaceBuilder, TypeLengthAndOrder_AllCount) {
  const auto built = [](auto add) {
    NamespaceBuilder builder(0);
    add(builder);
    return builder.finish();
  };
  const std::vector<NamespaceHash> all = {
      built([](auto& b) { b.add_string("1"); }),
      built([](auto& b) { b.add_bytes("1"); }),
      built([](auto& b) { b.add_int(1); }),
      built([](auto& b) { b.add_float(1); }),
      built([](auto& b) { b.add_null(); }),
      built([](auto& b) { b.begin_list(1); }),
      built([](auto& b) { b.add_string("12"), b.add_string("3"); }),
      built([](auto& b) { b.add_string("1"), b.add_string("23"); }),
      built([](auto& b) { b.add_string("3"), b.add_string("12"); }),
  };
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(all[i], all[j]) << i << " " << j;
  }
}

}  // namespace
}  // namespace kvrouter
