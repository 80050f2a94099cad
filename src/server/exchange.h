// One request on its way through the gateway:
//
//   read -> (tokenize) -> decide -> (wait for a worker) -> send -> relay -> done
//
// It is sent a second time, to the next best worker, when the first one fails before anything of its answer was passed
// on.  Ends exactly once, whatever happens.
#pragma once

#include <boost/asio/steady_timer.hpp>
#include <optional>

#include "server/gateway.h"
#include "server/gateway_request.h"

namespace kvrouter {

class Exchange : public std::enable_shared_from_this<Exchange> {
 public:
  using Clock = std::chrono::steady_clock;

  Exchange(Gateway& gateway, HttpRequest&& request, std::shared_ptr<HttpReply> reply);

  void start(bool routed);
  // Tries to find a worker again.  False while there is none with room.
  bool try_to_send();
  // The service stops: ends without an answer.
  void abort();

 private:
  enum class Attempt { kNone, kWaiting, kRelaying };

  void decide();
  void enqueue();
  void leave_queue();
  void send_to(WorkerId worker);
  void on_head(const UpstreamHead& head);
  void on_data(std::string_view data);
  void on_end(const std::string& error);
  void on_client_gone();
  void report_hit();
  void retry_or_fail(Fleet::Outcome outcome);
  void cancel_calls();
  void end_attempt(Fleet::Outcome outcome);
  void answer_error(unsigned status, const std::string& message, bool try_again_later = false);
  void finish(unsigned status);

  Gateway& gateway_;
  HttpRequest request_;
  std::shared_ptr<HttpReply> reply_;
  GatewayRequest parsed_;
  TokenIds tokens_;  // null: not known
  std::vector<LocalHash> hashes_;
  Decision decision_;
  bool routed_ = false;

  std::shared_ptr<UpstreamCall> call_, tokenizing_;
  Attempt attempt_ = Attempt::kNone;
  std::optional<WorkerId> worker_, failed_worker_;
  std::uint64_t generation_ = 0;
  unsigned retries_ = 0;

  unsigned status_ = 0;
  std::string content_type_;
  std::string collected_;  // of an answer with a known, small length
  bool streamed_ = false, event_stream_ = false, at_event_end_ = true;
  std::int64_t events_ = 0;
  std::string last_events_;  // the end of a stream

  boost::asio::steady_timer queue_timer_;
  std::optional<std::list<Exchange*>::iterator> queued_;
  Clock::time_point began_ = Clock::now();
  Clock::time_point queued_at_;
  Clock::time_point sent_at_;
  AccessRecord record_;
  bool done_ = false;
};

}  // namespace kvrouter
