#include "server/json_reader.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <nlohmann/json.hpp>

namespace kvrouter {
namespace {

namespace dom = simdjson::dom;

std::string error_of(const std::string& text) {
  dom::object object;
  return parse_json_object(text, "the body", object);
}

// What read_token_ids makes of {"ids": ...}.
std::optional<std::vector<TokenId>> ids_of(const std::string& text) {
  dom::object object;
  EXPECT_EQ(parse_json_object(text, "the body", object), "");
  const auto field = json_field(object, "ids");
  dom::array list;
  if (!field || field->get(list) != simdjson::SUCCESS) return std::nullopt;
  std::vector<TokenId> ids = {1, 2, 3};
  ids.clear();
  if (!read_token_ids(list, ids)) {
    EXPECT_TRUE(ids.empty());
    return std::nullopt;
  }
  return ids;
}

TEST(JsonReader, TokenIds_AreReadBack) {
  EXPECT_TRUE(rc::check([] {
    const auto ids = *rc::gen::arbitrary<std::vector<TokenId>>();
    RC_ASSERT(ids_of(nlohmann::json{{"x", "y"}, {"ids", ids}}.dump()) == ids);
  }));
}

TEST(JsonReader, WhatIsNoTokenId_IsRefused) {
  EXPECT_TRUE(rc::check([] {
    auto list = nlohmann::json(*rc::gen::arbitrary<std::vector<TokenId>>());
    const std::vector<nlohmann::json> others = {-1, 4294967296, 1.5, "1", nullptr, true, {1}, 18446744073709551615u};
    const auto at = *rc::gen::inRange<std::size_t>(0, list.size() + 1);
    list.insert(list.begin() + static_cast<std::ptrdiff_t>(at), *rc::gen::elementOf(others));
    RC_ASSERT(!ids_of(nlohmann::json{{"ids", list}}.dump()));
  }));
}

TEST(JsonReader, ALongText_AndThenAShortOne) {
  const std::vector<TokenId> many(200'000, 4'294'967'295);
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(ids_of(nlohmann::json{{"ids", many}}.dump()), many);
    EXPECT_EQ(ids_of(R"({"ids": [7]})"), std::vector<TokenId>{7});
  }
}

TEST(JsonReader, TheLastOfAName_AndNullIsNone) {
  EXPECT_EQ(ids_of(R"({"ids": [1], "ids": [2], "other": {"ids": [3]}})"), std::vector<TokenId>{2});
  EXPECT_EQ(ids_of(R"({"ids": [1], "ids": null})"), std::nullopt);
}

TEST(JsonReader, TheWholeTextIsChecked) {
  EXPECT_EQ(error_of("{}"), "");
  for (const char* text :
       {"", " ", "{", "[]", "1", "nul", R"({"a": 1,})", R"({"a": [1 2]})", R"({"a": 1}})", "{'a': 1}", R"({"a": 01})",
        R"({"a": "\x"})", "{\"a\": \"\xff\"}", R"({"a": "\ud800"})", R"({"a": NaN})"}) {
    EXPECT_NE(error_of(text), "") << text;
  }
  EXPECT_EQ(error_of("[1]"), "the body must be a JSON object");
  EXPECT_NE(error_of(R"({"a": 18446744073709551616})").find("out of range"), std::string::npos);
}

TEST(JsonReader, DeepNesting_IsRefused) {
  const std::string deep(4'000'000, '[');
  EXPECT_NE(error_of(R"({"tools": )" + deep), "");
  EXPECT_EQ(error_of(R"({"tools": )" + std::string(100'000, '[') + std::string(100'000, ']') + "}"),
            "the body is nested too deeply");
}

}  // namespace
}  // namespace kvrouter
