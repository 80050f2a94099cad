// JSON from outside, of bounded depth.
//
// The JSON library parses and frees values without recursion, but copies and writes them with it, a stack frame a
// level: a body of a few hundred kilobytes of '[' would end the process where it is passed on.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

namespace kvrouter {

inline constexpr int kMaxJsonDepth = 128;

// What to say where parse_json() gives nothing.
inline constexpr const char* kInvalidJson = "the body is not valid JSON (or nested more than 128 deep)";
static_assert(kMaxJsonDepth == 128);

// A discarded value where `text` is not JSON, or is nested deeper than kMaxJsonDepth.
nlohmann::json parse_json(std::string_view text);

}  // namespace kvrouter
