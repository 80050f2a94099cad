// Parts of a line of Prometheus' text format.
#pragma once

#include <cstddef>
#include <string_view>

namespace kvrouter {

// Where the text goes on after this label, or the beginning of one (a="x", or a="); npos if it has none.  `text` is a
// whole sample, or what stands between its braces.
inline std::size_t after_label(std::string_view text, std::string_view label) {
  std::size_t at = text.find(label);
  // Not the end of another label's name.
  while (at != std::string_view::npos && at > 0 && text[at - 1] != '{' && text[at - 1] != ',') {
    at = text.find(label, at + 1);
  }
  return at == std::string_view::npos ? at : at + label.size();
}

}  // namespace kvrouter
