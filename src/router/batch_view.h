// A batch of requests as a policy sees it: the index and the load as they are, plus what the batch itself has sent
// where so far.
//
// Not safe for threads.  Made to be kept: a batch no larger than the ones before it allocates nothing.
#pragma once

#include <span>
#include <vector>

#include "kvrouter/policy.h"
#include "kvrouter/prefix_index.h"
#include "kvrouter/router.h"
#include "router/account.h"
#include "router/routed_prefixes.h"

namespace kvrouter {

class BatchView final : public Batch {
 public:
  struct Sources {
    const PrefixIndex& index;
    const LoadTable& loads;
    Account* account;  // or null
  };

  // `workers`: availability and load, as before the batch.  The spans and the sources must outlive the batch.
  void begin(const Sources& sources, std::size_t block_size, std::span<const BatchRequest> requests,
             std::span<const WorkerView> workers, std::span<Choice> choices);
  // Enters what was assigned into the account, and writes the tickets.
  void enter();

  std::size_t size() const override { return requests_.size(); }
  RoutingRequest request(std::size_t i) const override;
  std::span<WorkerView> workers(std::size_t i) override;
  void assign(std::size_t i, WorkerId worker) override;

  // Number of requests assigned: fewer than size() only if the policy failed.
  std::size_t num_assigned() const { return num_assigned_; }
  bool assigned(std::size_t i) const { return assigned_[i]; }

 private:
  std::span<const PrefixHash> prefixes_of(std::size_t i) const {
    return std::span(prefixes_).subspan(first_prefix_[i], first_prefix_[i + 1] - first_prefix_[i]);
  }
  // For each worker the leading blocks of request `i` that it holds or was sent by this batch, into overlap_; and
  // those on their way since before the batch too, into expected_.
  void find_overlap(std::size_t i);

  const PrefixIndex* index_ = nullptr;
  Account* account_ = nullptr;
  std::size_t block_size_ = 1;
  std::span<const BatchRequest> requests_;
  std::span<Choice> choices_;
  std::vector<WorkerView> loads_;  // before the batch, plus what it sent
  std::vector<WorkerView> rows_;   // of the request asked for last
  std::vector<PrefixHash> prefixes_;
  std::vector<std::size_t> first_prefix_;
  std::vector<double> expected_output_;  // hinted or learnt
  std::vector<bool> assigned_;
  std::size_t num_assigned_ = 0;
  RoutedPrefixes sent_;
  // What the index said of the request asked for last: the samples of one prompt mostly follow each other.
  std::vector<std::uint32_t> held_;
  std::vector<std::uint32_t> on_the_way_;  // raised by the account
  std::size_t held_for_ = 0;               // that request, plus one; 0: none
  std::vector<std::uint32_t> overlap_, expected_;
};

}  // namespace kvrouter
