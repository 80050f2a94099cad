#include "router/batch_view.h"

#include <algorithm>

namespace kvrouter {

void BatchView::begin(const PrefixIndex& index, std::size_t block_size, std::span<const BatchRequest> requests,
                      std::span<const WorkerView> workers, std::span<Choice> choices) {
  index_ = &index;
  block_size_ = block_size;
  requests_ = requests;
  choices_ = choices;
  loads_.assign(workers.begin(), workers.end());
  held_.resize(workers.size());
  held_for_ = 0;
  sent_.reset(workers.size());
  assigned_.assign(requests.size(), false);
  num_assigned_ = 0;

  first_prefix_.assign(1, 0);
  for (const BatchRequest& request : requests) first_prefix_.push_back(first_prefix_.back() + request.blocks.size());
  prefixes_.resize(first_prefix_.back());
  for (std::size_t i = 0; i < requests.size(); ++i) {
    hash_prefixes(requests[i].blocks, std::span(prefixes_).subspan(first_prefix_[i], requests[i].blocks.size()));
  }
}

RoutingRequest BatchView::request(std::size_t i) const {
  return {requests_[i].num_tokens, block_size_, prefixes_of(i)};
}

std::span<const std::uint32_t> BatchView::overlap_of(std::size_t i) {
  const std::span<const PrefixHash> prefixes = prefixes_of(i);
  const auto same_as = [&](std::size_t other) {
    const std::span<const PrefixHash> others = prefixes_of(other);
    return others.size() == prefixes.size() && (prefixes.empty() || others.back() == prefixes.back());
  };
  if (held_for_ == 0 || !same_as(held_for_ - 1)) {
    index_->find_matches(requests_[i].blocks, held_);
    held_for_ = i + 1;
  }
  overlap_.assign(held_.begin(), held_.end());
  sent_.raise(prefixes, overlap_);
  return overlap_;
}

std::span<WorkerView> BatchView::workers(std::size_t i) {
  const std::span<const std::uint32_t> overlap = overlap_of(i);
  rows_.assign(loads_.begin(), loads_.end());
  for (std::size_t w = 0; w < rows_.size(); ++w) rows_[w].overlap_blocks = overlap[w];
  return rows_;
}

void BatchView::assign(std::size_t i, WorkerId worker) {
  choices_[i] = {worker, overlap_of(i)[worker]};
  sent_.add(prefixes_of(i), worker);
  ++loads_[worker].waiting;
  assigned_[i] = true;
  ++num_assigned_;
}

}  // namespace kvrouter
