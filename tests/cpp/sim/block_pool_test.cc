#include "sim/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace kvrouter::sim {
namespace {

std::vector<BlockId> take(BlockPool& pool, std::int32_t count) {
  std::vector<BlockId> ids;
  pool.take(count, ids);
  return ids;
}

std::vector<BlockHash> removed(const KvEvents& events) {
  std::vector<BlockHash> hashes;
  for (const KvEvent& event : events.events) {
    if (event.kind == KvEvent::Kind::kRemoved) hashes.push_back(events.hashes[event.first_hash]);
  }
  return hashes;
}

TEST(BlockPool, FreshPool_HandsOutBlocksInOrder_NeverTheNullBlock) {
  BlockPool pool(5, nullptr);
  EXPECT_EQ(pool.num_free(), 4);
  EXPECT_EQ(take(pool, 4), (std::vector<BlockId>{1, 2, 3, 4}));
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_DOUBLE_EQ(pool.usage(), 1.0);
}

TEST(BlockPool, CachedBlocksAreReusedLast_TheEndOfAPrefixBeforeItsBeginning) {
  KvEvents events;
  BlockPool pool(6, &events);
  const auto ids = take(pool, 3);  // 1, 2 cached, 3 not
  pool.cache(1, 101);
  pool.cache(2, 102);
  pool.release_reversed(ids);
  // Block 3 went to the front, then the untouched 4 and 5, then 2 before 1.
  EXPECT_EQ(take(pool, 5), (std::vector<BlockId>{3, 4, 5, 2, 1}));
  EXPECT_EQ(removed(events), (std::vector<BlockHash>{102, 101}));
  EXPECT_EQ(pool.find(101), -1);
}

TEST(BlockPool, Held_ListsEachPrefixOnce_AndApartThoseSaidToBeRemovedThoughAnotherBlockHoldsThem) {
  KvEvents events;
  BlockPool pool(4, &events);
  const auto ids = take(pool, 3);  // 1, 2 and 3
  pool.cache(1, 101);
  pool.cache(2, 101);
  pool.cache(3, 103);
  EXPECT_EQ(pool.held().told.size(), 2u);
  const BlockId first[] = {1};
  pool.release_reversed(first);
  EXPECT_EQ(take(pool, 1), (std::vector<BlockId>{1}));
  EXPECT_EQ(removed(events), (std::vector<BlockHash>{101}));
  EXPECT_EQ(pool.held().told, (std::vector<BlockHash>{103}));
  EXPECT_EQ(pool.held().told_removed, (std::vector<BlockHash>{101}));
  pool.cache(1, 101);  // said to be stored again
  EXPECT_EQ(pool.held().told.size(), 2u);
  EXPECT_TRUE(pool.held().told_removed.empty());
}

TEST(BlockPool, TouchedBlock_IsNotEvicted_AndGoesToTheBackAgain) {
  BlockPool pool(4, nullptr);
  const auto ids = take(pool, 3);
  for (const BlockId id : ids) pool.cache(id, static_cast<BlockHash>(id));
  pool.release_reversed(ids);  // 3, 2, 1
  const BlockId hit[] = {3};
  pool.touch(hit);
  EXPECT_EQ(pool.num_free(), 2);
  pool.release_reversed(hit);
  EXPECT_EQ(take(pool, 3), (std::vector<BlockId>{2, 1, 3}));
}

TEST(BlockPool, SharedBlock_StaysUsedUntilItsLastUserGoes) {
  BlockPool pool(3, nullptr);
  const auto ids = take(pool, 1);
  pool.touch(ids);
  pool.release_reversed(ids);
  EXPECT_FALSE(pool.is_free(1));
  EXPECT_FALSE(pool.reset());
  pool.release_reversed(ids);
  EXPECT_TRUE(pool.is_free(1));
  EXPECT_TRUE(pool.reset());
}

TEST(BlockPool, DuplicateOfAPrefix_TheFirstOneCachedIsFound_EachRemovalIsTold) {
  KvEvents events;
  BlockPool pool(4, &events);
  const auto ids = take(pool, 3);
  for (const BlockId id : {2, 1, 3}) pool.cache(id, 42);
  EXPECT_EQ(pool.find(42), 2);
  const BlockId second[] = {2};
  pool.release_reversed(second);
  take(pool, 1);
  EXPECT_EQ(removed(events), std::vector<BlockHash>{42});
  EXPECT_EQ(pool.find(42), 1);
}

TEST(BlockPool, Reset_ForgetsPrefixes_AndSaysSo) {
  KvEvents events;
  BlockPool pool(3, &events);
  const auto ids = take(pool, 2);
  pool.cache(1, 7);
  EXPECT_FALSE(pool.reset());
  EXPECT_TRUE(events.empty());
  pool.release_reversed(ids);
  EXPECT_TRUE(pool.reset());
  ASSERT_EQ(events.events.size(), 1U);
  EXPECT_EQ(events.events[0].kind, KvEvent::Kind::kCleared);
  EXPECT_EQ(pool.find(7), -1);
  take(pool, 2);
  EXPECT_EQ(events.events.size(), 1U);  // nothing left to evict
}

// The sentences of block_pool.h, as plainly as they can be written.
struct NaivePool {
  explicit NaivePool(BlockId count) : references(static_cast<std::size_t>(count)) {
    for (BlockId id = 1; id < count; ++id) queue.push_back(id);
  }
  std::vector<BlockId> take(std::int32_t count) {
    std::vector<BlockId> ids(queue.begin(), queue.begin() + count);
    queue.erase(queue.begin(), queue.begin() + count);
    for (const BlockId id : ids) {
      references[static_cast<std::size_t>(id)] = 1;
      if (const auto hash = hash_of.find(id); hash != hash_of.end()) {
        std::erase(holders[hash->second], id);
        told.push_back(hash->second);
        hash_of.erase(hash);
      }
    }
    return ids;
  }
  void touch(BlockId id) {
    if (references[static_cast<std::size_t>(id)]++ == 0) std::erase(queue, id);
  }
  void release_reversed(const std::vector<BlockId>& ids) {
    std::vector<BlockId> front;
    for (auto id = ids.rbegin(); id != ids.rend(); ++id) {
      if (--references[static_cast<std::size_t>(*id)] > 0) continue;
      if (hash_of.count(*id)) {
        queue.push_back(*id);
      } else {
        front.push_back(*id);
      }
    }
    queue.insert(queue.begin(), front.begin(), front.end());
  }
  void cache(BlockId id, BlockHash hash) {
    hash_of[id] = hash;
    holders[hash].push_back(id);
  }
  BlockId find(BlockHash hash) { return holders[hash].empty() ? -1 : holders[hash].front(); }

  std::deque<BlockId> queue;
  std::vector<int> references;
  std::map<BlockId, BlockHash> hash_of;
  std::map<BlockHash, std::vector<BlockId>> holders;
  std::vector<BlockHash> told;
};

void compare_with_naive(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](auto limit) { return static_cast<decltype(limit)>(random() % static_cast<unsigned>(limit)); };
  const BlockId num_blocks = 2 + below(BlockId{18});
  KvEvents events;
  BlockPool pool(num_blocks, &events);
  NaivePool naive(num_blocks);
  std::vector<std::vector<BlockId>> users;
  // Neighbouring hashes share slots of the table: its probing has to hold.
  const auto any_hash = [&] { return BlockHash{below(10U)} * 64; };
  for (int call = 0; call < 1000; ++call) {
    const int kind = below(5);
    if (kind == 0) {
      auto ids = take(pool, below(pool.num_free() + 1));
      ASSERT_EQ(ids, naive.take(static_cast<std::int32_t>(ids.size())));
      if (!ids.empty()) users.push_back(std::move(ids));
    } else if (kind == 1 && !users.empty()) {
      const std::size_t which = below(users.size());
      pool.release_reversed(users[which]);
      naive.release_reversed(users[which]);
      users.erase(users.begin() + static_cast<std::ptrdiff_t>(which));
    } else if (kind <= 3 && !users.empty()) {
      for (const BlockId id : users[below(users.size())]) {
        if (naive.hash_of.count(id)) continue;
        const BlockHash hash = any_hash();
        pool.cache(id, hash);
        naive.cache(id, hash);
      }
    } else if (kind == 4) {
      const BlockHash hash = any_hash();
      const BlockId found = pool.find(hash);
      ASSERT_EQ(found, naive.find(hash));
      if (found >= 0) {
        users.push_back({found});
        pool.touch(users.back());
        naive.touch(found);
      }
    }
    ASSERT_EQ(pool.num_free(), static_cast<std::int32_t>(naive.queue.size()));
  }
  EXPECT_EQ(removed(events), naive.told);
}

TEST(BlockPool, AnyOrderOfCalls_AnswersAsTheNaivePool) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    compare_with_naive(seed);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace kvrouter::sim
