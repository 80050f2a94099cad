// A blocking TCP client that sends bytes as they are: for tests of what a server does with any of them.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvrouter::testing {

class RawClient {
 public:
  explicit RawClient(std::uint16_t port, int receive_timeout_s = 10) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    timeval limit{receive_timeout_s, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
      ::close(fd_);
      throw std::runtime_error("cannot connect");
    }
  }
  ~RawClient() { close(); }
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  // False when the server has closed the connection.
  bool send(std::string_view data) {
    while (!data.empty()) {
      const ssize_t sent = ::send(fd_, data.data(), data.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      data.remove_prefix(static_cast<std::size_t>(sent));
    }
    return true;
  }
  void half_close() { ::shutdown(fd_, SHUT_WR); }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  // What has arrived so far, at least one byte more than before; empty at the end or after the time limit.
  std::string read_some() {
    char data[65536];
    const ssize_t count = ::recv(fd_, data, sizeof(data), 0);
    return count > 0 ? std::string(data, static_cast<std::size_t>(count)) : std::string();
  }
  std::string read_until(std::string_view end) {
    while (true) {
      const std::size_t found = buffered_.find(end);
      if (found != std::string::npos) {
        std::string result = buffered_.substr(0, found + end.size());
        buffered_.erase(0, found + end.size());
        return result;
      }
      const std::string more = read_some();
      if (more.empty()) return std::exchange(buffered_, {});
      buffered_ += more;
    }
  }
  std::string read_to_end() {
    std::string all = std::exchange(buffered_, {});
    for (std::string more = read_some(); !more.empty(); more = read_some()) all += more;
    return all;
  }
  // One answer with a Content-Length, headers and body.
  std::string read_answer() {
    std::string answer = read_until("\r\n\r\n");
    const std::size_t length_at = answer.find("Content-Length: ");
    if (length_at == std::string::npos) return answer;
    const std::size_t length = std::strtoul(answer.c_str() + length_at + 16, nullptr, 10);
    while (buffered_.size() < length) {
      const std::string more = read_some();
      if (more.empty()) break;
      buffered_ += more;
    }
    answer += buffered_.substr(0, length);
    buffered_.erase(0, length);
    return answer;
  }

 private:
  int fd_;
  std::string buffered_;
};

inline std::string post(std::string_view path, std::string_view body) {
  return "POST " + std::string(path) + " HTTP/1.1\r\nHost: x\r\nContent-Length: " + std::to_string(body.size()) +
         "\r\n\r\n" + std::string(body);
}

}  // namespace kvrouter::testing
