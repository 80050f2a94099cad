// GET and POST /snapshot: what is known of the workers' caches, for a replica that joins, or into the service's file.
//
// Walking the index and waiting for the disk are done by a thread of their own, which ends with the object; few
// requests may wait for it.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "kvrouter/router.h"
#include "server/http_server.h"

namespace kvrouter {

class SnapshotApi {
 public:
  static constexpr std::size_t kMostWaiting = 4;  // beyond: 503

  // file: where POST writes; empty: nowhere.
  SnapshotApi(Router& router, std::string file);
  ~SnapshotApi();
  SnapshotApi(const SnapshotApi&) = delete;
  SnapshotApi& operator=(const SnapshotApi&) = delete;

  void answer(const HttpRequest& request, std::shared_ptr<HttpReply> reply);

 private:
  struct Job {
    bool to_file;
    std::shared_ptr<HttpReply> reply;
  };
  void run();
  void serve(const Job& job);

  Router& router_;
  const std::string file_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Job> jobs_;
  bool stopped_ = false;
  std::thread thread_;
};

}  // namespace kvrouter
