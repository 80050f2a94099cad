// The header fields of a request, in their order, names as they came.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvrouter {

inline bool equal_ignoring_case(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [&](char x, char y) { return lower(x) == lower(y); });
}

class HttpHeaders {
 public:
  void add(std::string_view name, std::string_view value) { fields_.emplace_back(name, value); }
  // The first value of this name, in any case; empty if there is none.
  std::string_view get(std::string_view name) const {
    for (const auto& [key, value] : fields_) {
      if (equal_ignoring_case(key, name)) return value;
    }
    return {};
  }
  auto begin() const { return fields_.begin(); }
  auto end() const { return fields_.end(); }

 private:
  std::vector<std::pair<std::string, std::string>> fields_;
};

}  // namespace kvrouter
