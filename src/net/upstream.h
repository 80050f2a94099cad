// Requests to one worker's HTTP server, over connections that are kept and reused, with TLS where its address says so.
// Used by one thread: that of the io_context.
#pragma once

#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "net/http_headers.h"
#include "net/tls.h"
#include "net/worker_url.h"

namespace kvrouter {

struct UpstreamLimits {
  std::chrono::milliseconds connect_timeout{2000};
  std::chrono::milliseconds head_timeout{600'000};  // from the request to the head of its answer
  std::chrono::milliseconds body_timeout{300'000};  // between two pieces of the answer
  // Shorter than the 5 s after which vLLM's server closes an idle connection.
  std::chrono::milliseconds keep_idle{4000};
  std::size_t max_idle = 256;
  std::size_t max_header_bytes = 64 * 1024;
  std::size_t max_collected = 64 * 1024 * 1024;  // of an answer that get() and post_json() wait for
};

struct UpstreamHead {
  unsigned status = 0;
  std::string content_type;
  HttpHeaders headers;
  std::optional<std::uint64_t> length;  // of the body, if it was said
};

// What becomes of a request, in this order.  After on_end nothing more is called.
struct UpstreamEvents {
  std::function<void(const UpstreamHead&)> on_head;
  std::function<void(std::string_view)> on_data;
  std::function<void(const std::string& error)> on_end;  // error empty: the answer is complete
};

class UpstreamCall {
 public:
  virtual ~UpstreamCall() = default;
  // Closes the connection, which is how a worker learns that nobody wants the answer.  No event follows.
  virtual void cancel() = 0;
};

class UpstreamPool {
 public:
  // REQUIRES: `tls` is given if address.tls; it is not used otherwise.
  UpstreamPool(boost::asio::io_context& io, HostPort address, UpstreamLimits limits,
               std::shared_ptr<TlsContext> tls = nullptr);
  ~UpstreamPool();  // drops what is idle; calls under way go on

  // Sends `request`, a whole HTTP/1.1 message.  A kept connection that turns out to be closed is replaced by a new one
  // once, before anything of an answer has come.
  std::shared_ptr<UpstreamCall> start(std::string request, UpstreamEvents events);
  // A GET whose answer is collected; `done` gets the status (0: no answer) and the body or the error.
  std::shared_ptr<UpstreamCall> get(std::string_view path, std::chrono::milliseconds timeout,
                                    std::function<void(unsigned status, std::string body)> done);
  std::shared_ptr<UpstreamCall> post_json(std::string_view path, std::string_view body,
                                          std::function<void(unsigned status, std::string body)> done);

  std::size_t idle() const;
  const HostPort& address() const;
  // host:port, as the Host header has it.
  std::string authority() const;

  class Shared;

 private:
  std::shared_ptr<Shared> shared_;
};

}  // namespace kvrouter
