// Runs a fuzz target over files, without libFuzzer: fuzz_<name> FILE_OR_FOLDER...
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace kvrouter::fuzz {
void fuzz_one(std::string_view input);
}

int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  for (int i = 1; i < argc; ++i) {
    if (!fs::is_directory(argv[i])) {
      files.emplace_back(argv[i]);
      continue;
    }
    for (const auto& entry : fs::directory_iterator(argv[i])) files.push_back(entry.path());
  }
  for (const fs::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      std::cerr << path << " cannot be read\n";
      return 1;
    }
    const std::string input((std::istreambuf_iterator<char>(file)), {});
    std::cerr << path.filename().string() << ": " << input.size() << " bytes\n";  // the last one named is at fault
    kvrouter::fuzz::fuzz_one(input);
  }
  std::cerr << files.size() << " inputs\n";
  return files.empty();
}
