#include "router/in_flight.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

namespace kvrouter {
namespace {

InFlight::Sent sent(WorkerId worker, std::size_t tokens, std::size_t miss, std::uint64_t prompt = 0) {
  return {worker, tokens, miss, prompt};
}

WorkerView row(InFlight& in_flight, double now, WorkerId worker = 0, std::size_t num_workers = 2) {
  std::vector<WorkerView> rows(num_workers);
  in_flight.fill(now, rows);
  return rows[worker];
}

TEST(InFlight, CountsWhatIsSentAndNotDone) {
  InFlight in_flight(2);
  const Ticket first = in_flight.add(0, sent(1, 1000, 600));
  const Ticket second = in_flight.add(0, sent(1, 500, 500));
  EXPECT_EQ(row(in_flight, 0, 1).in_flight, 2);
  EXPECT_EQ(row(in_flight, 0, 1).prefill_tokens, 1100);
  EXPECT_EQ(row(in_flight, 0, 1).context_tokens, 1500);
  EXPECT_EQ(row(in_flight, 0, 0).in_flight, 0);
  EXPECT_TRUE(in_flight.complete(1, first, {}));
  EXPECT_FALSE(in_flight.complete(1, first, {}));
  EXPECT_FALSE(in_flight.first_token(1, first));
  EXPECT_FALSE(in_flight.complete(1, 0, {}));
  EXPECT_TRUE(in_flight.complete(1, second, {}));
  EXPECT_EQ(row(in_flight, 1, 1).in_flight, 0);
  EXPECT_EQ(row(in_flight, 1, 1).context_tokens, 0);
}

TEST(InFlight, PrefillDrainsWithTime) {
  InFlight in_flight(1);
  in_flight.add(10, sent(0, 2000, 2000));
  const double half = 10 + 1000 * InFlight::kPriorSecondsPerToken;
  EXPECT_NEAR(row(in_flight, half, 0, 1).prefill_tokens, 1000, 1e-6);
  EXPECT_EQ(row(in_flight, 100, 0, 1).prefill_tokens, 0);
}

TEST(InFlight, FirstTokenSaysThatEarlierOnesArePrefilled) {
  InFlight in_flight(1);
  in_flight.add(0, sent(0, 1000, 1000));
  const Ticket second = in_flight.add(0, sent(0, 1000, 1000));
  in_flight.add(0, sent(0, 1000, 1000));
  in_flight.first_token(1e-6, second);
  EXPECT_NEAR(row(in_flight, 1e-6, 0, 1).prefill_tokens, 1000, 1);
}

TEST(InFlight, LearnsHowQuicklyAWorkerPrefills) {
  InFlight in_flight(2);
  double now = 0;
  for (int i = 0; i < 50; ++i) {
    const Ticket ticket = in_flight.add(now, sent(0, 2048, 2048));
    now += 2048 * 5e-4;
    in_flight.first_token(now, ticket);
    in_flight.complete(now, ticket, {});
    now += 3;  // idle: not held against the worker
  }
  EXPECT_NEAR(row(in_flight, now, 0).seconds_per_token, 5e-4, 1e-5);
  // What is known of the fleet is the guess for a worker that nothing is known of.
  EXPECT_NEAR(row(in_flight, now, 1).seconds_per_token, 5e-4, 1e-4);
}

TEST(InFlight, AFewPrefillsDoNotMakeAWorkerSlow) {
  InFlight in_flight(2);
  double now = 0;
  const auto prefill = [&](WorkerId worker, double seconds_per_token) {
    const Ticket ticket = in_flight.add(now, sent(worker, 2048, 2048));
    now += 2048 * seconds_per_token;
    in_flight.first_token(now, ticket);
    in_flight.complete(now, ticket, {});
  };
  const auto slowness = [&] {
    return row(in_flight, now, 1).seconds_per_token / row(in_flight, now, 0).seconds_per_token;
  };
  prefill(0, 1e-4);
  prefill(1, 3e-4);
  EXPECT_LT(slowness(), 1.4);
  for (int i = 0; i < 100; ++i) {
    prefill(0, 1e-4);
    prefill(1, 3e-4);
  }
  EXPECT_GT(slowness(), 2.4);
}

TEST(InFlight, FirstTokenTimeWithTheCompletionIsAsGood) {
  InFlight in_flight(1);
  double now = 0;
  for (int i = 0; i < 50; ++i) {
    const Ticket ticket = in_flight.add(now, sent(0, 2048, 2048));
    in_flight.complete(now + 10, ticket, {100, 2048 * 2e-4});
    now += 20;
  }
  EXPECT_NEAR(row(in_flight, now, 0, 1).seconds_per_token, 2e-4, 1e-5);
}

TEST(InFlight, LoadMessagesCorrectTheAccount_ButNotOfWhatTheyCannotKnow) {
  InFlight in_flight(1);
  for (int i = 0; i < 4; ++i) in_flight.add(i, sent(0, 100, 100));
  // The worker knows of one: three of the four are done, and the last may be on its way still.
  in_flight.on_load(3.2, 0, {0.1, 0, 1}, 1);
  EXPECT_EQ(row(in_flight, 3.2, 0, 1).in_flight, 1);
  in_flight.add(3.3, sent(0, 100, 100));
  in_flight.on_load(3.4, 0, {0, 0, 0}, 2);
  EXPECT_EQ(row(in_flight, 3.4, 0, 1).in_flight, 2);  // both younger than a message may be old
  in_flight.on_load(10, 0, {0, 0, 0}, 2);             // no new word
  EXPECT_EQ(row(in_flight, 10, 0, 1).in_flight, 2);
  in_flight.on_load(10, 0, {0, 0, 0}, 3);
  EXPECT_EQ(row(in_flight, 10, 0, 1).in_flight, 0);
}

TEST(InFlight, WithFeedbackLoadMessagesChangeNothing) {
  InFlight in_flight(1);
  in_flight.add(0, sent(0, 100, 100));
  in_flight.complete(0.5, in_flight.add(0, sent(0, 100, 100)), {});
  in_flight.on_load(5, 0, {0, 0, 0}, 1);
  EXPECT_EQ(row(in_flight, 5, 0, 1).in_flight, 1);
}

TEST(InFlight, WithFeedbackLoadMessagesEndWhatOthersSentLongAgo) {
  InFlight in_flight(1);
  in_flight.add(0, sent(0, 100, 100));  // by somebody who reports nothing
  for (int i = 0; i < 3; ++i) in_flight.add(50, sent(0, 100, 100));
  in_flight.complete(70, in_flight.add(60, sent(0, 100, 100)), {});
  in_flight.on_load(70, 0, {0.1, 0, 4}, 1);  // the worker counts them all
  EXPECT_EQ(row(in_flight, 70, 0, 1).in_flight, 4);
  in_flight.on_load(70, 0, {0, 0, 0}, 2);
  EXPECT_EQ(row(in_flight, 70, 0, 1).in_flight, 3);  // the others are too young to be missed
}

TEST(InFlight, WhatNobodyFinishesExpires) {
  InFlight in_flight(1);
  in_flight.add(0, sent(0, 100, 100));
  in_flight.complete(0.5, in_flight.add(0, sent(0, 100, 100)), {});
  in_flight.on_load(InFlight::kExpiry + 1, 0, {0, 5, 5}, 1);
  EXPECT_EQ(in_flight.size(), 0u);
}

TEST(InFlight, LengthsAreLearntPerPrompt) {
  InFlight in_flight(1);
  EXPECT_EQ(in_flight.expected_output(7), 0);
  in_flight.complete(1, in_flight.add(0, sent(0, 10, 10, 7)), {400, 0});
  in_flight.complete(1, in_flight.add(0, sent(0, 10, 10, 8)), {100, 0});
  EXPECT_EQ(in_flight.expected_output(7), 400);
  EXPECT_EQ(in_flight.expected_output(8), 100);
  EXPECT_GT(in_flight.expected_output(9), 100);
  EXPECT_LT(in_flight.expected_output(9), 400);
}

RC_GTEST_PROP(InFlight, AgreesWithAListOfRequests, ()) {
  struct Request {
    WorkerId worker;
    double tokens;
  };
  InFlight in_flight(3);
  std::map<Ticket, Request> open;
  double now = 0;
  for (const int action : *rc::gen::container<std::vector<int>>(rc::gen::inRange(0, 10))) {
    now += 0.01;
    if (action < 5 || open.empty()) {
      const auto worker = static_cast<WorkerId>(action % 3);
      const Ticket ticket = in_flight.add(now, sent(worker, 10 + action, 5));
      RC_ASSERT(open.emplace(ticket, Request{worker, 10.0 + action}).second);
    } else {
      auto it = open.begin();
      std::advance(it, action % static_cast<int>(open.size()));
      if (action == 9) {
        const WorkerId worker = it->second.worker;
        in_flight.drop_all(worker);
        std::erase_if(open, [&](const auto& entry) { return entry.second.worker == worker; });
      } else if (action == 8) {
        RC_ASSERT(in_flight.first_token(now, it->first));
      } else {
        RC_ASSERT(in_flight.complete(now, it->first, {}));
        open.erase(it);
      }
    }
    std::vector<WorkerView> rows(3);
    in_flight.fill(now, rows);
    for (WorkerId w = 0; w < 3; ++w) {
      double tokens = 0;
      std::int64_t count = 0;
      for (const auto& [ticket, request] : open) {
        if (request.worker == w) tokens += request.tokens, ++count;
      }
      RC_ASSERT(rows[w].in_flight == count);
      RC_ASSERT(rows[w].context_tokens == tokens);
      RC_ASSERT(rows[w].prefill_tokens >= 0 && rows[w].prefill_tokens <= 5.0 * static_cast<double>(count));
    }
    RC_ASSERT(in_flight.size() == open.size());
  }
}

TEST(InFlight, BeyondTheMost_TheWorkersOldestIsTakenForDone) {
  InFlight in_flight(2);
  const Ticket first = in_flight.add(0, sent(0, 10, 10));
  for (std::size_t i = 1; i < InFlight::kMost; ++i) in_flight.add(0, sent(0, 10, 10));
  EXPECT_EQ(in_flight.dropped(), 0u);
  const Ticket last = in_flight.add(0, sent(0, 10, 10));
  EXPECT_EQ(in_flight.size(), InFlight::kMost);
  EXPECT_EQ(in_flight.dropped(), 1u);
  EXPECT_FALSE(in_flight.complete(0, first, {}));
  EXPECT_TRUE(in_flight.complete(0, last, {}));
}

}  // namespace
}  // namespace kvrouter
