// The dashboard: one page, and the JSON that it asks for.
#pragma once

#include <string>
#include <string_view>

#include "server/fleet.h"
#include "server/gateway.h"

namespace kvrouter {

// The page, as it stands in dashboard.html.
std::string_view dashboard_page();
std::string dashboard_json(const Router& router, const Fleet& fleet, const Gateway& gateway);

}  // namespace kvrouter
