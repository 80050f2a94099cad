// Errors in the shape that OpenAI's clients understand.
#pragma once

#include <string>
#include <string_view>

namespace kvrouter {

// {"error": {"message", "type", "param": null, "code"}}; the type follows from the status.
std::string api_error_json(unsigned status, std::string_view message);
// The same as the last event of a stream.
std::string api_error_event(unsigned status, std::string_view message);

}  // namespace kvrouter
