#include "server/json_reader.h"

#include <limits>
#include <memory>

namespace kvrouter {
namespace {

namespace dom = simdjson::dom;

// A parser keeps memory of about fourteen times its longest text.
constexpr std::size_t kLongestKept = 256 * 1024;

dom::parser& parser_for(std::size_t length) {
  thread_local dom::parser kept;
  thread_local std::unique_ptr<dom::parser> large;  // of the last text, which is still being read
  large.reset();
  if (length <= kLongestKept) return kept;
  large = std::make_unique<dom::parser>();
  return *large;
}

std::string reason(simdjson::error_code error) {
  switch (error) {
    case simdjson::DEPTH_ERROR:
      return " is nested too deeply";
    case simdjson::NUMBER_ERROR:
      return " is not valid JSON: it has a number that is malformed or out of range";
    default:
      return " is not valid JSON";
  }
}

}  // namespace

std::string parse_json_object(const std::string& text, std::string_view what, dom::object& object) {
  dom::element root;
  if (const auto error = parser_for(text.size()).parse(text).get(root)) return std::string(what) + reason(error);
  if (root.get(object) != simdjson::SUCCESS) return std::string(what) + " must be a JSON object";
  return {};
}

std::optional<dom::element> json_field(dom::object object, std::string_view name) {
  std::optional<dom::element> found;
  for (const auto& [key, value] : object) {
    if (key == name) found = value;
  }
  return found && !found->is_null() ? found : std::nullopt;
}

bool read_token_ids(dom::array list, std::vector<TokenId>& out) {
  out.reserve(list.size());
  for (const dom::element entry : list) {
    std::uint64_t id = 0;
    if (entry.get(id) != simdjson::SUCCESS || id > std::numeric_limits<TokenId>::max()) {
      out.clear();
      return false;
    }
    out.push_back(static_cast<TokenId>(id));
  }
  return true;
}

}  // namespace kvrouter
