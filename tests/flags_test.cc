#include "engine/base/flag_set.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "server/flags.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// Sets a variable for one test.
class ScopedEnv {
 public:
  ScopedEnv(const std::string& name, const std::string& value) : name_(name) {
    setenv(name.c_str(), value.c_str(), 1);
  }
  ~ScopedEnv() { unsetenv(name_.c_str()); }

 private:
  const std::string name_;
};

class FlagsTest : public ::testing::Test {
 protected:
  std::string WriteFile(const std::string& text) {
    const std::string path = ::testing::TempDir() + "/flags_test_" + std::to_string(getpid());
    std::ofstream(path) << text;
    return path;
  }

  std::string name_ = "none";
  bool on_ = false;
  int64_t bytes_ = 64 << 20;
  double seconds_ = 1.5;
  std::vector<std::string> list_;
  FlagSet set_ = [this] {
    FlagSet set("prog [flags]\n", "FLAGSTEST_");
    set.Section("Things");
    set.Add("name", &name_, "a name");
    set.Add("on-off", &on_, "a switch");
    set.AddBytes("bytes", &bytes_, "a size");
    set.Add("seconds", &seconds_, "a time");
    set.Add("item", &list_, "an item");
    return set;
  }();
};

TEST_F(FlagsTest, CommandLineForms) {
  const auto positional = set_.Parse({"--name=a=b", "--on-off", "pos", "--bytes", "8G", "--item=1",
                                      "--item=2", "--", "--seconds"});
  ASSERT_TRUE(positional.ok()) << positional.status();
  EXPECT_EQ(name_, "a=b");
  EXPECT_TRUE(on_);
  EXPECT_EQ(bytes_, int64_t{8} << 30);
  EXPECT_THAT(list_, ElementsAre("1", "2"));
  EXPECT_THAT(*positional, ElementsAre("pos", "--seconds"));
}

TEST_F(FlagsTest, CommandLineWinsOverEnvironmentOverFile) {
  const std::string file = WriteFile("# comment\nname = file\n\nbytes=1K\nseconds = 9\n");
  const ScopedEnv name("FLAGSTEST_NAME", "env"), bytes("FLAGSTEST_BYTES", "2K");
  ASSERT_TRUE(set_.Parse({"--config=" + file, "--name=line"}).ok());
  EXPECT_EQ(name_, "line");
  EXPECT_EQ(bytes_, 2048);
  EXPECT_EQ(seconds_, 9);
}

TEST_F(FlagsTest, TheFileMayComeFromTheEnvironment) {
  const ScopedEnv config("FLAGSTEST_CONFIG", WriteFile("on-off = true\n"));
  const ScopedEnv foreign("FLAGSTEST_SERVICE_HOST", "10.0.0.1");  // as Kubernetes sets it
  ASSERT_TRUE(set_.Parse({}).ok());
  EXPECT_TRUE(on_);
}

TEST_F(FlagsTest, ErrorsAreOneLineThatNamesTheFlag) {
  const auto error = [this](const std::vector<std::string>& args) {
    const absl::Status status = set_.Parse(args).status();
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("\n")));
    return std::string(status.message());
  };
  EXPECT_THAT(error({"--nam=x"}), StartsWith("--nam: no such flag"));
  EXPECT_THAT(error({"-x"}), StartsWith("-x: no such flag"));
  EXPECT_THAT(error({"--name"}), StartsWith("--name: expected a value"));
  EXPECT_THAT(error({"--bytes=12Q"}), StartsWith("--bytes: expected bytes"));
  EXPECT_THAT(error({"--bytes=-1"}), StartsWith("--bytes: expected bytes"));
  EXPECT_THAT(error({"--bytes=99999999999G"}), StartsWith("--bytes: expected bytes"));
  EXPECT_THAT(error({"--seconds=soon"}), StartsWith("--seconds: expected a number"));
  EXPECT_THAT(error({"--on-off=perhaps"}), StartsWith("--on-off: expected true or false"));
  const std::string file = WriteFile("name = x\ncolour = red\n");
  EXPECT_THAT(error({"--config=" + file}), StartsWith(file + ":2: colour: no such flag"));
  EXPECT_THAT(error({"--config=" + WriteFile("just words\n")}), HasSubstr("expected name = value"));
  EXPECT_THAT(error({"--config=" + WriteFile("config = x\n")}), HasSubstr("another file"));
  EXPECT_THAT(error({"--config=/no/such/file"}), HasSubstr("cannot read"));
  const ScopedEnv bad("FLAGSTEST_SECONDS", "soon");
  EXPECT_THAT(error({}), StartsWith("FLAGSTEST_SECONDS: expected a number"));
}

TEST_F(FlagsTest, HelpHasALineForEachFlagWithItsDefault) {
  ASSERT_TRUE(set_.Parse({"--help", "--nonsense"}).ok());
  EXPECT_TRUE(set_.help_requested());
  const std::string help = set_.Help();
  EXPECT_THAT(help, HasSubstr("prog [flags]"));
  EXPECT_THAT(help, HasSubstr("--bytes=64M"));
  EXPECT_THAT(help, HasSubstr("--seconds=1.5"));
  EXPECT_THAT(help, HasSubstr("a switch\n"));
}

TEST(ByteSizesTest, UnitsArePowersOf1024) {
  EXPECT_EQ(*ParseBytes("0"), 0);
  EXPECT_EQ(*ParseBytes("123"), 123);
  EXPECT_EQ(*ParseBytes("1k"), 1024);
  EXPECT_EQ(*ParseBytes("3MiB"), 3 << 20);
  EXPECT_EQ(*ParseBytes("2 GB"), int64_t{2} << 30);
  EXPECT_EQ(*ParseBytes("1T"), int64_t{1} << 40);
  for (const char* bad : {"", "G", "1.5G", "1X", "B"}) EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
}

// --- The server's own ---

absl::Status ParseServer(const std::vector<std::string>& args, ServerFlags* flags) {
  FlagSet set = MakeServerFlagSet(flags);
  const auto positional = set.Parse(args);
  return positional.ok() ? Validate(*flags) : positional.status();
}

TEST(ServerFlagsTest, DefaultsAreValidAndNamesStay) {
  ServerFlags flags;
  ASSERT_TRUE(ParseServer({"--model=m", "--listen=127.0.0.1:1", "--metrics-listen=", "--dtype=bf16",
                           "--prefill-policy=coverage", "--prefill-coverage=0.9",
                           "--kv-policy=adakv", "--kv-budget=512", "--threads=3", "--kv-bytes=2G",
                           "--max-context=4096", "--step-tokens=512", "--seed=5"},
                          &flags)
                  .ok());
  EXPECT_EQ(flags.policy.prefill().preset(), "coverage");
  EXPECT_FLOAT_EQ(flags.policy.prefill().coverage(), 0.9f);
  EXPECT_EQ(flags.policy.kv().budget_tokens(), 512);
  EXPECT_FALSE(flags.policy.kv().has_fraction());
  EXPECT_EQ(flags.kv_bytes, int64_t{2} << 30);
  EXPECT_EQ(flags.seed, 5);
  ServerFlags defaults;
  EXPECT_TRUE(ParseServer({"--model=m"}, &defaults).ok());
  EXPECT_EQ(defaults.listen, "127.0.0.1:50051");
  EXPECT_EQ(defaults.metrics_listen, "127.0.0.1:9464");
}

TEST(ServerFlagsTest, WrongValuesNameTheFlag) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{}, "--model:"},
      {{"--model=m", "--listen=here"}, "--listen:"},
      {{"--model=m", "--listen=127.0.0.1:99999"}, "--listen:"},
      {{"--model=m", "--listen=:1"}, "--listen:"},
      {{"--model=m", "--metrics-listen=x"}, "--metrics-listen:"},
      {{"--model=m", "--dtype=f16"}, "--dtype:"},
      {{"--model=m", "--linear-dtype=e4m3"}, "--linear-dtype:"},
      {{"--model=m", "--max-open-streams=0"}, "--max-open-streams:"},
      {{"--model=m", "--drain-seconds=-1"}, "--drain-seconds:"},
      {{"--model=m", "--drain-seconds=nan"}, "--drain-seconds:"},
      {{"--model=m", "--max-message-bytes=4G"}, "--max-message-bytes:"},
      {{"--model=m", "--long-lane-bytes=1M"}, "--long-lane-bytes:"},
      {{"--model=m", "--default-deadline-seconds=999999"}, "--default-deadline-seconds:"},
      {{"--model=m", "--tls-cert=x"}, "--tls-key:"},
      {{"--model=m", "--kv-budget=99999999999"}, "--kv-budget:"},
      {{"--model=m", "--threads=-1"}, "--threads:"},
      {{"--model=m", "--max-key-requests=-1"}, "--max-key-requests:"},
      {{"--model=m", "--max-key-queue-tokens=-1"}, "--max-key-queue-tokens:"},
      {{"--model=m", "--max-key-sessions=-1"}, "--max-key-sessions:"},
      {{"--model=m", "--max-key-session-bytes=-1"}, "--max-key-session-bytes:"},
      {{"--model=m", "--max-key-streams=-1"}, "--max-key-streams:"},
      {{"--model=m", "--session-ttl-seconds=0.5"}, "--session-ttl-seconds:"},
      {{"--model=m", "--session-device-bytes=-1"}, "--session-device-bytes:"},
      {{"--model=m", "--session-host-bytes=-1"}, "--session-host-bytes:"},
      {{"--model=m", "--session-dir-bytes=1G"}, "--session-dir-bytes: needs --session-dir"},
      {{"--model=m", "--session-dir=/dev/null"}, "--session-dir: not a folder"},
  };
  for (const auto& [args, prefix] : cases) {
    ServerFlags flags;
    EXPECT_THAT(std::string(ParseServer(args, &flags).message()), StartsWith(prefix));
  }
}

TEST(ServerFlagsTest, BeyondLoopbackNeedsAuthOrAWord) {
  for (const char* address :
       {"127.0.0.1:1", "127.1.2.3:1", "localhost:1", "[::1]:1", "unix:/tmp/s"}) {
    EXPECT_TRUE(IsLoopback(address)) << address;
  }
  for (const char* address : {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", "host:1"}) {
    EXPECT_FALSE(IsLoopback(address)) << address;
    ServerFlags flags;
    const std::string listen = std::string("--listen=") + address;
    EXPECT_THAT(std::string(ParseServer({"--model=m", listen}, &flags).message()),
                StartsWith("--listen: not a loopback address"));
    ServerFlags allowed;
    EXPECT_TRUE(ParseServer({"--model=m", listen, "--allow-remote-without-auth"}, &allowed).ok());
    ServerFlags keyed;
    EXPECT_TRUE(ParseServer({"--model=m", listen, "--key-file=k"}, &keyed).ok());
  }
}

}  // namespace
}  // namespace entropyserve
