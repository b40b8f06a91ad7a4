#pragma once
#include "../lib/files.h"
inline std::string routing_page(const Json& data) { return data.dump(); }
