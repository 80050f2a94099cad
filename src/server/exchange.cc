#include "server/exchange.h"

#include <charconv>

#include "server/api_error.h"
#include "server/forwarded_request.h"

namespace kvrouter {
namespace {

constexpr std::string_view kJson = "application/json";
constexpr std::string_view kRetryAfter = "1";
// Longer answers of known length are passed on as they come, too.
constexpr std::uint64_t kMaxCollected = 1024 * 1024;
// Of a stream's end: its usage is in there.
constexpr std::size_t kUsageBytes = 2048;

double seconds_since(Exchange::Clock::time_point begin) {
  return std::chrono::duration<double>(Exchange::Clock::now() - begin).count();
}

// 500 may be the request's doing, and must not take the worker from everybody else.
Fleet::Outcome outcome_of(unsigned status) {
  if (status < 500) return Fleet::Outcome::kSuccess;
  return status == 500 ? Fleet::Outcome::kError : Fleet::Outcome::kFailure;
}

// The last count of this name in an answer; -1 if it has none.
std::int64_t last_count(std::string_view body, std::string_view key) {
  std::size_t at = body.rfind(key);
  if (at == std::string_view::npos) return -1;
  at += key.size();
  while (at < body.size() && body[at] == ' ') ++at;
  std::int64_t count = -1;
  const auto [end, error] = std::from_chars(body.data() + at, body.data() + body.size(), count);
  return error == std::errc() && count >= 0 ? count : -1;
}

}  // namespace

Exchange::Exchange(Gateway& gateway, HttpRequest&& request, std::shared_ptr<HttpReply> reply)
    : gateway_(gateway), request_(std::move(request)), reply_(std::move(reply)), queue_timer_(gateway.io_) {
  record_.method = request_.method;
  record_.path = request_.path;
  record_.traceparent = std::string(request_.headers.get("traceparent")).substr(0, 128);
}

void Exchange::start(bool routed) {
  routed_ = routed;
  reply_->on_client_gone([weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->on_client_gone();
  });
  if (done_) return;
  if (routed) {
    if (const std::string error = parse_gateway_request(request_.body, parsed_); !error.empty()) {
      ++gateway_.counters_.bad_requests;
      return answer_error(400, error);
    }
    record_.model = parsed_.model.substr(0, 256);
  }
  if (!parsed_.tokens.empty()) tokens_ = std::make_shared<std::vector<TokenId>>(std::move(parsed_.tokens));
  if (tokens_ || parsed_.to_tokenize.empty()) return decide();
  tokenizing_ =
      gateway_.tokenizer_.tokenize(parsed_.model, parsed_.to_tokenize, [self = shared_from_this()](TokenIds ids) {
        if (self->done_) return;
        self->tokens_ = std::move(ids);
        self->decide();
      });
}

void Exchange::decide() {
  if (tokens_) {
    record_.prompt_tokens = tokens_->size();
    const std::size_t block_size = gateway_.router_.block_size();
    hashes_.resize(tokens_->size() / block_size);
    const NamespaceHash ns = gateway_.fleet_.is_adapter(parsed_.model) ? lora_namespace(parsed_.model) : 0;
    hash_blocks(*tokens_, block_size, ns, hashes_);
  }
  const bool others_wait = !gateway_.queue_.empty();
  if (!others_wait && try_to_send()) return;
  enqueue();
  if (others_wait) gateway_.serve_queue();  // they may wait for another model
}

bool Exchange::try_to_send() {
  thread_local std::vector<std::uint8_t> eligible;
  switch (gateway_.fleet_.eligible(parsed_.model, failed_worker_, eligible)) {
    case Fleet::Availability::kFull:
      return false;
    case Fleet::Availability::kUnknownModel:
      leave_queue();
      answer_error(404, "no worker serves the model '" + parsed_.model.substr(0, 256) + "'");
      return true;
    case Fleet::Availability::kDown:
      leave_queue();
      ++gateway_.counters_.unavailable;
      answer_error(retries_ > 0 ? 502 : 503,
                   retries_ > 0 ? "the worker failed, and there is no other for this model"
                                : "no worker for this model can be reached",
                   true);
      return true;
    case Fleet::Availability::kSome:
      break;
  }
  leave_queue();
  // Without tokens a length is needed all the same; that of the text, at four bytes a token, is near enough.
  const std::size_t num_tokens = tokens_ ? tokens_->size() : std::max<std::size_t>(1, request_.body.size() / 4);
  decision_ = gateway_.router_.explain(RouteQuery{hashes_, std::max<std::size_t>(1, num_tokens), eligible});
  if (routed_) gateway_.log_decision(parsed_.model, hashes_, decision_);
  send_to(decision_.choice.worker);
  return true;
}

void Exchange::enqueue() {
  Gateway& g = gateway_;
  if (g.queue_.size() >= g.options_.max_queue) {
    ++g.counters_.rejected_full;
    return answer_error(429, "all workers are busy and the queue is full", true);
  }
  queued_at_ = Clock::now();
  queued_ = g.queue_.insert(g.queue_.end(), this);
  queue_timer_.expires_after(g.options_.queue_timeout);
  queue_timer_.async_wait([weak = weak_from_this()](boost::system::error_code error) {
    const auto self = weak.lock();
    if (error || !self || self->done_ || !self->queued_) return;
    self->leave_queue();
    ++self->gateway_.counters_.queue_timeouts;
    self->answer_error(503, "all workers were busy for too long", true);
  });
}

void Exchange::leave_queue() {
  if (!queued_) return;
  gateway_.queue_.erase(*queued_);
  queued_.reset();
  queue_timer_.cancel();
  record_.queued_s = seconds_since(queued_at_);
}

void Exchange::send_to(WorkerId id) {
  FleetWorker& worker = gateway_.fleet_.worker(id);
  worker_ = id;
  generation_ = worker.generation;
  attempt_ = Attempt::kWaiting;
  sent_at_ = Clock::now();
  record_.worker = id;
  record_.worker_url = worker.spec.url;
  record_.overlap_blocks = decision_.choice.overlap_blocks;
  if (tokens_) {
    const std::uint64_t hit = std::uint64_t{decision_.choice.overlap_blocks} * gateway_.router_.block_size();
    for (auto* counts : {&worker.routed_tokens, &gateway_.counters_.routed_tokens}) *counts += tokens_->size();
    for (auto* counts : {&worker.predicted_hit_tokens, &gateway_.counters_.predicted_hit_tokens}) *counts += hit;
    ++worker.expected.requests;
    worker.expected.prompt_tokens += tokens_->size();
    if (!tokens_->empty()) {  // the last token of a prompt is always computed
      const std::size_t block_size = gateway_.router_.block_size();
      worker.expected.predicted_tokens += std::min<std::uint64_t>(hit, (tokens_->size() - 1) / block_size * block_size);
    }
  }
  gateway_.fleet_.begin_request(id);
  auto self = shared_from_this();
  const std::string authority = worker.pool->authority();
  const ForwardTo to{authority, worker.rank, !gateway_.options_.strip_authorization};
  call_ =
      worker.pool->start(forwarded_request(request_, to), {[self](const UpstreamHead& head) { self->on_head(head); },
                                                           [self](std::string_view data) { self->on_data(data); },
                                                           [self](const std::string& error) { self->on_end(error); }});
}

void Exchange::on_head(const UpstreamHead& head) {
  if (done_) return;
  if (head.status >= 500 && retries_ == 0) {
    call_->cancel();
    return retry_or_fail(outcome_of(head.status));
  }
  attempt_ = Attempt::kRelaying;
  status_ = head.status;
  record_.first_byte_s = seconds_since(began_);
  content_type_ = head.content_type.empty() ? "application/octet-stream" : head.content_type;
  event_stream_ = content_type_.starts_with("text/event-stream");
  reply_->add_header("x-kvrouter-worker", record_.worker_url);
  reply_->add_header("x-kvrouter-worker-id", std::to_string(*worker_));
  if (routed_) reply_->add_header("x-kvrouter-overlap-blocks", std::to_string(record_.overlap_blocks));
  for (const std::string_view name : {"x-request-id", "retry-after", "content-encoding", "location"}) {
    if (const auto value = head.headers.get(name); !value.empty()) reply_->add_header(name, value);
  }
  if (head.length && *head.length <= kMaxCollected && !event_stream_) return collected_.reserve(*head.length);
  streamed_ = true;
  reply_->begin_stream(status_, content_type_);
}

void Exchange::on_data(std::string_view data) {
  if (done_) return;
  record_.bytes += data.size();
  if (!streamed_) {
    collected_ += data;
    return;
  }
  if (event_stream_) {
    for (std::size_t at = data.find("data:"); at != std::string_view::npos; at = data.find("data:", at + 5)) ++events_;
    at_event_end_ = data.ends_with("\n\n") || data.ends_with("\r\n\r\n");
    last_events_.append(data.substr(data.size() - std::min(data.size(), kUsageBytes)));
    if (last_events_.size() > 2 * kUsageBytes) last_events_.erase(0, last_events_.size() - kUsageBytes);
    if (record_.bytes == data.size()) gateway_.router_.first_token(decision_.choice.ticket);
  }
  reply_->write(std::string(data));
}

void Exchange::on_end(const std::string& error) {
  if (done_) return;
  call_ = nullptr;
  if (attempt_ == Attempt::kWaiting) return retry_or_fail(Fleet::Outcome::kFailure);
  if (error.empty()) {
    const std::int64_t tokens =
        streamed_ ? std::max<std::int64_t>(events_ - 1, 0) : last_count(collected_, "\"completion_tokens\":");
    gateway_.router_.complete(decision_.choice.ticket, {tokens, 0});
    report_hit();
    end_attempt(outcome_of(status_));
    streamed_ ? reply_->end() : reply_->send(status_, content_type_, std::move(collected_));
    return finish(status_);
  }
  end_attempt(Fleet::Outcome::kFailure);
  if (!streamed_) {
    return answer_error(502, "the worker broke off its answer");
  }
  ++gateway_.counters_.broken_streams;
  if (event_stream_) {
    const auto reply = reply_;  // a client that does not read may be cut off by the first of these
    reply->write((at_event_end_ ? "" : "\n\n") + api_error_event(502, "the worker broke off its answer"));
    reply->end();
  }  // else the reply is dropped, which cuts the connection: its length tells the client that the answer is not whole
  finish(502);
}

// Workers tell what they found in their caches when they run with --enable-prompt-tokens-details (in streams: where the
// client asks for usage).  Text of the model that looks like it cannot be: its quotes are escaped.
void Exchange::report_hit() {
  if (!tokens_ || tokens_->empty()) return;
  const std::string_view answer = streamed_ ? last_events_ : collected_;
  const std::int64_t cached = last_count(answer, "\"cached_tokens\":");
  // Of a list of prompts the first alone was predicted for.
  if (cached < 0 || last_count(answer, "\"prompt_tokens\":") != static_cast<std::int64_t>(tokens_->size())) return;
  ++gateway_.fleet_.worker(*worker_).hit_reports;
  gateway_.router_.report_hit(
      *worker_, {decision_.choice.overlap_blocks, tokens_->size(), static_cast<std::size_t>(cached), hashes_});
}

void Exchange::retry_or_fail(Fleet::Outcome outcome) {
  end_attempt(outcome);
  gateway_.router_.complete(decision_.choice.ticket);
  attempt_ = Attempt::kNone;
  call_ = nullptr;
  if (retries_ > 0) return answer_error(502, "two workers failed to answer", true);
  ++retries_;
  ++record_.retries;
  ++gateway_.counters_.retries;
  failed_worker_ = worker_;
  worker_.reset();
  if (!try_to_send() && !done_) enqueue();
}

void Exchange::on_client_gone() {
  if (done_) return;
  ++gateway_.counters_.client_gone;
  cancel_calls();
  leave_queue();
  if (attempt_ != Attempt::kNone) {
    gateway_.router_.complete(decision_.choice.ticket);
    end_attempt(Fleet::Outcome::kAbandoned);
  }
  finish(499);  // as nginx writes it into its log
}

void Exchange::cancel_calls() {
  for (auto* call : {&call_, &tokenizing_}) {
    if (*call) (*call)->cancel();
    *call = nullptr;
  }
}

void Exchange::abort() {
  if (done_) return;
  done_ = true;
  cancel_calls();
  queue_timer_.cancel();
  reply_ = nullptr;
}

void Exchange::end_attempt(Fleet::Outcome outcome) {
  attempt_ = Attempt::kNone;
  gateway_.fleet_.end_request(*worker_, generation_, outcome);
}

void Exchange::answer_error(unsigned status, const std::string& message, bool try_again_later) {
  if (try_again_later) reply_->add_header("retry-after", kRetryAfter);
  reply_->send(status, kJson, api_error_json(status, message));
  finish(status);
}

void Exchange::finish(unsigned status) {
  if (done_) return;
  done_ = true;
  const auto self = shared_from_this();
  reply_ = nullptr;
  call_ = tokenizing_ = nullptr;
  record_.status = status;
  record_.seconds = seconds_since(began_);
  ++gateway_.counters_.by_status[status];
  gateway_.log_.write(record_);
  gateway_.exchanges_.erase(self);
}

}  // namespace kvrouter
