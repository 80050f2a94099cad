#include "replica/peer_book.h"

namespace kvrouter {

PeerBook::Outcome PeerBook::on_message(std::span<const std::byte> bytes) {
  if (!decode(bytes, message_)) {
    ++counts_.malformed;
    return Outcome::kMalformed;
  }
  if (message_.incarnation == own_) return Outcome::kOwn;
  if (message_.block_size != block_size_) return Outcome::kOtherBlockSize;
  if (incarnation_ != message_.incarnation) {  // another life, or the first message of all
    forget();
    incarnation_ = message_.incarnation;
  } else if (message_.sequence <= last_sequence_) {
    ++counts_.duplicates;
    return Outcome::kIgnored;
  } else {
    counts_.missed += message_.sequence - last_sequence_ - 1;
  }
  last_sequence_ = message_.sequence;
  ++counts_.messages;
  for (const PeerEvent& event : message_.events) {
    if (event.kind == PeerEvent::Kind::kBye) {
      forget();
      return Outcome::kBye;
    }
    apply(event);
  }
  return Outcome::kApplied;
}

void PeerBook::forget() {
  for (const auto& [slot, entry] : entries_) dropped_.push_back(entry.ours);
  drop_all();
  entries_.clear();
  incarnation_.reset();
}

void PeerBook::apply(const PeerEvent& event) {
  switch (event.kind) {
    case PeerEvent::Kind::kRouted:
      return on_routed(event.request, std::span(message_.prefixes).subspan(event.begin, event.count));
    case PeerEvent::Kind::kFirstToken:
      if (const auto entry = find(event.request.ticket); entry != entries_.end() && !entry->second.prefilled) {
        entry->second.prefilled = true;
        sink_.first_token(entry->second.ours);
      }
      return;
    case PeerEvent::Kind::kComplete:
      if (const auto entry = find(event.request.ticket); entry != entries_.end()) {
        sink_.complete(entry->second.ours, event.completion);
        entries_.erase(entry);
      }
      return;
    case PeerEvent::Kind::kState:
      return on_state(event);
    case PeerEvent::Kind::kBye:
      return;
  }
}

void PeerBook::on_routed(const PeerRequest& request, std::span<const PrefixHash> prefixes) {
  if (request.ticket == 0) {
    if (const auto worker = worker_of(request)) sink_.add(*worker, request, {}, true);
    return;
  }
  if (const auto old = entries_.find(slot_of(request.ticket)); old != entries_.end()) {
    if (old->second.theirs >= request.ticket) return;  // it is known, or over already
    drop(old);                                         // the peer has given its slot to this one
    drop_all();
  }
  enter(request, prefixes, true);
}

void PeerBook::on_state(const PeerEvent& state) {
  const std::span<const PeerRequest> requests = std::span(message_.requests).subspan(state.begin, state.count);
  auto at = entries_.lower_bound(static_cast<std::uint32_t>(state.slots_begin));
  const auto past = [&](Entries::iterator entry) { return entry == entries_.end() || entry->first >= state.slots_end; };
  for (const PeerRequest& request : requests) {
    while (!past(at) && at->first < slot_of(request.ticket)) drop(at++);
    const bool known = !past(at) && at->second.theirs == request.ticket;
    if (known && at->second.worker == sink_.find_worker(message_.workers[request.worker])) {
      Entry& entry = at->second;
      ++at;
      if (request.prefilled && !entry.prefilled) {
        entry.prefilled = true;
        sink_.first_token(entry.ours);
      }
      continue;
    }
    if (!past(at) && at->first == slot_of(request.ticket)) drop(at++);
    enter(request, {}, false);
  }
  while (!past(at)) drop(at++);
  drop_all();
}

void PeerBook::enter(const PeerRequest& request, std::span<const PrefixHash> prefixes, bool fresh) {
  const auto worker = worker_of(request);
  if (!worker) return;
  if (entries_.size() >= kMost) {
    ++counts_.not_entered;
    return;
  }
  const Ticket ours = sink_.add(*worker, request, prefixes, fresh);
  if (ours == 0) return;
  entries_[slot_of(request.ticket)] = {request.ticket, ours, *worker, request.prefilled};
}

std::optional<WorkerId> PeerBook::worker_of(const PeerRequest& request) {
  const auto worker = sink_.find_worker(message_.workers[request.worker]);
  if (!worker) ++counts_.unknown_workers;
  return worker;
}

PeerBook::Entries::iterator PeerBook::find(Ticket theirs) {
  const auto entry = entries_.find(slot_of(theirs));
  return entry != entries_.end() && entry->second.theirs == theirs ? entry : entries_.end();
}

void PeerBook::drop(Entries::iterator entry) {
  dropped_.push_back(entry->second.ours);
  entries_.erase(entry);
}

void PeerBook::drop_all() {
  if (!dropped_.empty()) sink_.drop(dropped_);
  dropped_.clear();
}

}  // namespace kvrouter
