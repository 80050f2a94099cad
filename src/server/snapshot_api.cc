#include "server/snapshot_api.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "replica/snapshot.h"

namespace kvrouter {
namespace {

constexpr std::string_view kJson = "application/json";

std::string detail(const std::string& text) {
  return nlohmann::json{{"detail", text}}.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

SnapshotApi::SnapshotApi(Router& router, std::string file)
    : router_(router), file_(std::move(file)), thread_([this] { run(); }) {}

SnapshotApi::~SnapshotApi() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  arrived_.notify_one();
  thread_.join();
}

void SnapshotApi::answer(const HttpRequest& request, std::shared_ptr<HttpReply> reply) {
  const bool to_file = request.method == "POST";
  if (!to_file && request.method != "GET") return reply->send(405, kJson, detail("use GET or POST"));
  if (to_file && file_.empty()) {
    return reply->send(409, kJson, detail("the service has no file to write to: start it with --snapshot FILE"));
  }
  {
    const std::lock_guard lock(mutex_);
    if (jobs_.size() >= kMostWaiting) {
      return reply->send(503, kJson, detail("other snapshots are under way: try again later"));
    }
    jobs_.push_back({to_file, std::move(reply)});
  }
  arrived_.notify_one();
}

void SnapshotApi::run() {
  for (;;) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      arrived_.wait(lock, [this] { return stopped_ || !jobs_.empty(); });
      if (stopped_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    serve(job);
  }
}

void SnapshotApi::serve(const Job& job) {
  if (job.reply->client_gone()) return;
  try {
    std::string bytes = router_.snapshot();
    if (!job.to_file) return job.reply->send(200, "application/octet-stream", std::move(bytes));
    write_file_atomically(file_, bytes);
    job.reply->send(200, kJson, nlohmann::json{{"status", "ok"}, {"bytes", bytes.size()}}.dump());
  } catch (const std::exception& error) {
    job.reply->send(500, kJson, detail(error.what()));
  }
}

}  // namespace kvrouter
