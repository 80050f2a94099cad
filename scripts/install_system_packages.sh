#!/usr/bin/env bash
# Installs the system packages that kvrouter is built and tested with, on Debian 12 and Ubuntu 22.04 or newer.
#
#   scripts/install_system_packages.sh [build|test|lint|fuzz]...     (default: build)
#
# It says first which packages are missing and what each is for, uses sudo only when something is to be installed and
# the user is not root, and does nothing when all are there.  What is optional is tried, and done without if need be.
set -euo pipefail

readonly BUILD_PACKAGES=(
  "g++|C++20 compiler"
  "cmake|build system"
  "ninja-build|runs the build in parallel"
  "ccache|makes rebuilds quick"
  "pkg-config|finds libraries"
  "libzmq3-dev|ZeroMQ: KV events and load messages"
  "cppzmq-dev|ZeroMQ for C++"
  "libxxhash-dev|XXH3 block hashes"
  "libboost-dev|Boost.Asio and Beast: the HTTP server"
  "libssl-dev|TLS, through Boost.Asio"
  "nlohmann-json3-dev|JSON that is written"
  "libsimdjson-dev|JSON that is read from sockets"
  "python3-venv|the Python environment .venv"
  "python3-dev|headers for the Python binding"
)
readonly TEST_PACKAGES=(
  "libgtest-dev|GoogleTest: C++ unit tests"
  "librapidcheck-dev|RapidCheck: C++ property tests"
  "openssl|certificates for the TLS tests"
  "chromium|the dashboard's tests in a browser (optional: they are skipped without it)"
)
readonly LINT_PACKAGES=(
  "clang-format|C++ style check"
)

readonly FUZZ_PACKAGES=(
  "clang|C++ compiler with libFuzzer: fuzz targets"
  "libclang-rt-dev|clang's runtime for fuzzing and sanitizers"
)

say() { printf 'install_system_packages: %s\n' "$*"; }
fail() { printf 'install_system_packages: %s\n' "$*" >&2; exit 1; }

usage() {
  sed -n '2,7s/^# \{0,1\}//p' "$0"
}

# The packages of the given sets, one "name|purpose" a line; tests and lint need the build too.
wanted_packages() {
  local set
  for set in "$@"; do
    case "$set" in
      build) printf '%s\n' "${BUILD_PACKAGES[@]}" ;;
      test) printf '%s\n' "${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}" ;;
      lint) printf '%s\n' "${LINT_PACKAGES[@]}" ;;
      fuzz) printf '%s\n' "${BUILD_PACKAGES[@]}" "${FUZZ_PACKAGES[@]}" ;;
      *) fail "unknown argument '$set': build, test, lint or fuzz" ;;
    esac
  done | awk '!seen[$0]++'
}

is_installed() {
  [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]
}

# A program that was installed in another way (a compiler of one's own, pip's cmake) serves as well as the package.
is_provided() {
  case "$1" in
    g++) command -v "${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null ;;
    cmake | ccache | clang | clang-format | openssl | chromium) command -v "$1" >/dev/null ;;
    ninja-build) command -v ninja >/dev/null ;;
    pkg-config) command -v pkg-config >/dev/null ;;
    # Under its version's name, or within another package (Ubuntu 22.04 has no package of this name).
    libclang-rt-dev) can_fuzz || { command -v apt-cache >/dev/null && ! apt-cache show "$1" >/dev/null 2>&1; } ;;
    # Another Python than the system's brings its own modules and headers.
    python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
    python3-dev) python3 -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null ;;
    *) false ;;
  esac
}

# Ubuntu, for one, has no chromium package that runs everywhere.
is_optional() {
  [[ "$1" == chromium ]]
}

# Whether clang++ links a fuzz target.
can_fuzz() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer,address,undefined -x c++ - -o /dev/null 2>/dev/null
}

main() {
  local argument
  for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
      usage
      return
    fi
  done
  local wanted
  wanted="$(wanted_packages "${@:-build}")" || exit 1

  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    say "this system has no apt: install the counterparts of these packages by hand, unless they are there"
    local line
    while IFS= read -r line; do
      printf '  %-20s %s\n' "${line%%|*}" "${line#*|}"
    done <<<"$wanted"
    return
  fi

  local missing=() name purpose
  while IFS='|' read -r name purpose; do
    if ! is_installed "$name" && ! is_provided "$name"; then
      if ((${#missing[@]} == 0)); then
        say "these packages are missing and will be installed:"
      fi
      missing+=("$name")
      printf '  %-20s %s\n' "$name" "$purpose"
    fi
  done <<<"$wanted"
  if ((${#missing[@]} == 0)); then
    say "everything for ${*:-build} is installed"
    return
  fi

  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || fail "not root and no sudo: run as root: apt-get install ${missing[*]}"
    as_root=(sudo)
    say "sudo is needed for apt-get, and may ask for a password"
  fi
  # Package lists may be missing or old, as in a fresh container; a mirror that is down is no reason to give up.
  "${as_root[@]}" apt-get update -qq || say "warning: apt-get update failed; trying with the lists that are there"
  local needed=() optional=()
  for name in "${missing[@]}"; do
    if is_optional "$name"; then optional+=("$name"); else needed+=("$name"); fi
  done
  local apt_install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive
    apt-get install --yes --no-install-recommends -qq)
  if ((${#needed[@]} > 0)); then
    "${apt_install[@]}" "${needed[@]}" >/dev/null || fail "apt-get could not install: ${needed[*]}"
  fi
  for name in "${needed[@]}"; do
    is_installed "$name" || fail "$name is still not installed"
  done
  for name in "${optional[@]}"; do
    "${apt_install[@]}" "$name" >/dev/null && is_installed "$name" || say "warning: apt-get could not install $name"
  done
  say "installed what was missing"
}

main "$@"
