#include "router/batch_view.h"

#include <algorithm>

namespace kvrouter {

void BatchView::begin(const Sources& sources, std::size_t block_size, std::span<const BatchRequest> requests,
                      std::span<const WorkerView> workers, std::span<Choice> choices) {
  index_ = &sources.index;
  account_ = sources.account;
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

  expected_output_.clear();
  for (const BatchRequest& request : requests) expected_output_.push_back(request.expected_output);
  if (!account_) return;
  const auto lock = account_->lock();
  account_->describe(sources.loads, sources.index, {}, loads_);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (expected_output_[i] <= 0) expected_output_[i] = account_->expected_output(prefixes_of(i));
  }
}

RoutingRequest BatchView::request(std::size_t i) const {
  return {requests_[i].num_tokens, block_size_, prefixes_of(i), expected_output_[i]};
}

void BatchView::find_overlap(std::size_t i) {
  const std::span<const PrefixHash> prefixes = prefixes_of(i);
  const auto same_as = [&](std::size_t other) {
    const std::span<const PrefixHash> others = prefixes_of(other);
    return others.size() == prefixes.size() && (prefixes.empty() || others.back() == prefixes.back());
  };
  if (held_for_ == 0 || !same_as(held_for_ - 1)) {
    index_->find_matches(requests_[i].blocks, held_);
    on_the_way_.assign(held_.begin(), held_.end());
    if (account_) {
      const auto lock = account_->lock();
      account_->raise(prefixes, on_the_way_);
    }
    held_for_ = i + 1;
  }
  overlap_.assign(held_.begin(), held_.end());
  sent_.raise(prefixes, overlap_);
  expected_.resize(overlap_.size());
  for (std::size_t w = 0; w < overlap_.size(); ++w) expected_[w] = std::max(overlap_[w], on_the_way_[w]);
}

std::span<WorkerView> BatchView::workers(std::size_t i) {
  find_overlap(i);
  rows_.assign(loads_.begin(), loads_.end());
  for (std::size_t w = 0; w < rows_.size(); ++w) {
    rows_[w].overlap_blocks = overlap_[w];
    rows_[w].expected_blocks = expected_[w];
  }
  return rows_;
}

void BatchView::assign(std::size_t i, WorkerId worker) {
  find_overlap(i);
  choices_[i] = {worker, overlap_[worker]};
  sent_.add(prefixes_of(i), worker);
  WorkerView& row = loads_[worker];
  ++row.waiting;
  ++row.in_flight;
  const double num_tokens = static_cast<double>(requests_[i].num_tokens);
  row.prefill_tokens += std::max(num_tokens - static_cast<double>(expected_[worker] * block_size_), 1.0);
  row.context_tokens += num_tokens;
  assigned_[i] = true;
  ++num_assigned_;
}

void BatchView::enter() {
  if (!account_) return;
  const auto lock = account_->lock();
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    choices_[i].ticket = account_->enter(request(i), choices_[i].worker, choices_[i].overlap_blocks);
  }
}

}  // namespace kvrouter
