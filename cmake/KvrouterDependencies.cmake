# Libraries from the system's packages (scripts/install_system_packages.sh names them).
find_package(Threads REQUIRED)

find_package(PkgConfig REQUIRED)
pkg_check_modules(ZMQ REQUIRED IMPORTED_TARGET libzmq)
find_path(CPPZMQ_INCLUDE_DIR zmq.hpp REQUIRED)
find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)
find_package(nlohmann_json 3.10 REQUIRED)
find_package(OpenSSL 3.0 REQUIRED)
find_package(simdjson REQUIRED)
find_package(Boost 1.74 REQUIRED)  # Asio and Beast: headers only

add_library(kvrouter_zmq INTERFACE)
target_include_directories(kvrouter_zmq SYSTEM INTERFACE ${CPPZMQ_INCLUDE_DIR})
target_link_libraries(kvrouter_zmq INTERFACE PkgConfig::ZMQ)

add_library(kvrouter_xxhash INTERFACE)
target_include_directories(kvrouter_xxhash SYSTEM INTERFACE ${XXHASH_INCLUDE_DIR})
target_compile_definitions(kvrouter_xxhash INTERFACE XXH_INLINE_ALL)

add_library(kvrouter_beast INTERFACE)
target_include_directories(kvrouter_beast SYSTEM INTERFACE ${Boost_INCLUDE_DIRS})
target_compile_definitions(kvrouter_beast INTERFACE BOOST_ERROR_CODE_HEADER_ONLY)
target_link_libraries(kvrouter_beast INTERFACE Threads::Threads OpenSSL::SSL)
