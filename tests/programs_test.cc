// The two programs as a user runs them: exit codes, single-line errors, one model served from start
// to drain.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>

#include "nlohmann/json.hpp"
#include "tests/child_process.h"

namespace entropyserve {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

std::string ReadAll(const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// A child process with its output in files.
class Process : public ChildProcess {
 public:
  // `out`, `in`: where standard output goes, and where input comes from, instead.
  Process(const std::string& program, std::vector<std::string> args, const std::string& input = "",
          const std::string& out = "", const std::string& in = "")
      : Process(program, std::move(args),
                Streams{in.empty() ? NewFile("in", input) : in, out.empty() ? NewFile("out") : out,
                        NewFile("err")}) {}

  std::string out() const { return ReadAll(streams_.out); }
  std::string err() const { return ReadAll(streams_.err); }

 private:
  Process(const std::string& program, std::vector<std::string> args, const Streams& streams)
      : ChildProcess(program, std::move(args), streams), streams_(streams) {}

  static std::string NewFile(const char* kind, const std::string& text = "") {
    static int counter = 0;
    const std::string path = ::testing::TempDir() + "/programs_test_" + std::to_string(getpid()) +
                             "_" + std::to_string(counter++) + "_" + kind;
    std::ofstream(path) << text;
    return path;
  }

  const Streams streams_;
};

void ExpectOneLine(Process& process, int exit_code, const std::string& part) {
  EXPECT_EQ(process.Wait(), exit_code);
  const std::string text = process.err();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << text;
  EXPECT_THAT(text, HasSubstr(part));
}

// A checked-in model of random weights with a vocabulary of single characters.
fs::path MakeTinyModel() {
  const fs::path source = fs::path(ES_SOURCE_DIR) / "tests/golden/models/llama_llama3";
  const fs::path folder =
      fs::path(::testing::TempDir()) / ("tiny_model_" + std::to_string(getpid()));
  fs::create_directories(folder);
  for (const char* name : {"config.json", "model.safetensors"}) {
    fs::copy_file(source / name, folder / name, fs::copy_options::overwrite_existing);
  }
  nlohmann::json vocab;
  for (int c = '!'; c <= '~'; ++c) vocab[std::string(1, static_cast<char>(c))] = c - '!';
  vocab["\u0120"] = 94;  // space, in byte-level BPE's alphabet
  vocab["\u010a"] = 95;  // newline
  nlohmann::json tokenizer;
  tokenizer["model"] = {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}};
  tokenizer["pre_tokenizer"] = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  tokenizer["decoder"] = {{"type", "ByteLevel"}};
  for (const auto& [id, name] : {std::pair(96, "<|im_start|>"), std::pair(97, "<|im_end|>")}) {
    tokenizer["added_tokens"].push_back(
        {{"id", id}, {"content", name}, {"special", true}, {"normalized", false}});
  }
  std::ofstream(folder / "tokenizer.json") << tokenizer.dump();
  std::ofstream(folder / "tokenizer_config.json") << nlohmann::json{
      {"eos_token", "<|im_end|>"},
      {"chat_template",
       "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
       "'<|im_end|>\\n' }}{% endfor %}"}};
  return folder;
}

class ServedProgram {
 public:
  // `max_files`: descriptors that the server may have; 0: as many as this program.
  explicit ServedProgram(const std::vector<std::string>& extra = {}, int max_files = 0) {
    port_file_ = ::testing::TempDir() + "/programs_test_port_" + std::to_string(getpid());
    fs::remove(port_file_);
    std::vector<std::string> args = {"--model=" + MakeTinyModel().string(), "--listen=127.0.0.1:0",
                                     "--metrics-listen=127.0.0.1:0", "--port-file=" + port_file_,
                                     "--threads=1"};
    args.insert(args.end(), extra.begin(), extra.end());
    std::string program = ENTROPYSERVE;
    if (max_files > 0) {
      const std::string limit = "ulimit -n " + std::to_string(max_files);
      args.insert(args.begin(), {"-c", limit + " && exec \"$0\" \"$@\"", program});
      program = "/bin/sh";
    }
    process_ = std::make_unique<Process>(program, args);
    const bool ready = WaitUntil([this] {
      return process_->Ended() || process_->err().find(" ready ") != std::string::npos;
    });
    EXPECT_TRUE(ready && !process_->Ended()) << process_->err();
  }
  std::string address() const {
    std::string port = ReadAll(port_file_);
    while (!port.empty() && port.back() == '\n') port.pop_back();
    return "127.0.0.1:" + port;
  }
  int port() const { return std::stoi(ReadAll(port_file_)); }
  std::unique_ptr<Process> Client(std::vector<std::string> args, const std::string& input = "") {
    args.push_back("--server=" + address());
    return std::make_unique<Process>(ENTROPYSERVE_CLIENT, args, input);
  }
  Process& process() { return *process_; }

 private:
  std::string port_file_;
  std::unique_ptr<Process> process_;
};

// --- Wrong usage ---

TEST(ServerProgramTest, HelpExplainsEveryFlag) {
  Process help(ENTROPYSERVE, {"--help"});
  EXPECT_EQ(help.Wait(), 0);
  for (const char* flag :
       {"--model", "--listen=127.0.0.1:50051", "--metrics-listen=127.0.0.1:9464", "--dtype=auto",
        "--prefill-policy=entropy", "--kv-policy=latent", "--drain-seconds=30", "--config"}) {
    EXPECT_THAT(help.out(), HasSubstr(flag));
  }
}

TEST(ServerProgramTest, WrongFlagsExitWithTwo) {
  for (const auto& [arg, part] :
       {std::pair("--modle=x", "--modle: no such flag"),
        std::pair("--dtype=f64", "--dtype: expected auto, f32, bf16"),
        std::pair("extra", "unexpected argument"), std::pair("--prefill-policy=magic", "magic"),
        std::pair("--prefill-base=0", "--prefill-base: must be at least 1"),
        std::pair("--kv-budget=1", "--kv-budget: 1 is less than"),
        std::pair("--listen=0.0.0.0:1", "not a loopback address")}) {
    Process process(ENTROPYSERVE, {"--model=m", arg});
    ExpectOneLine(process, 2, part);
  }
  Process none(ENTROPYSERVE, {});
  ExpectOneLine(none, 2, "--model: required");
}

TEST(ServerProgramTest, MissingAndForeignModelsExitWithOne) {
  Process missing(ENTROPYSERVE,
                  {"--model=/no/such/model", "--listen=127.0.0.1:0", "--metrics-listen="});
  ExpectOneLine(missing, 1, "/no/such/model");
  const std::string foreign = ::testing::TempDir() + "/foreign.gguf";
  std::ofstream(foreign) << "this is no model";
  Process strange(ENTROPYSERVE,
                  {"--model=" + foreign, "--listen=127.0.0.1:0", "--metrics-listen="});
  ExpectOneLine(strange, 1, "foreign.gguf");
  Process shape(ENTROPYSERVE, {"--model=synthetic:none", "--listen=127.0.0.1:0"});
  ExpectOneLine(shape, 1, "no synthetic model 'none'");
}

TEST(ClientProgramTest, ExitCodesAndSingleLines) {
  Process help(ENTROPYSERVE_CLIENT, {"--help"});
  EXPECT_EQ(help.Wait(), 0);
  for (const char* command :
       {"generate", "inspect", "chat", "session", "models", "bench", "tokenize", "detokenize"}) {
    EXPECT_THAT(help.out(), HasSubstr(command));
    Process own(ENTROPYSERVE_CLIENT, {command, "--help"});
    EXPECT_EQ(own.Wait(), 0);
    EXPECT_THAT(own.out(), HasSubstr("--server=127.0.0.1:50051"));
  }
  Process none(ENTROPYSERVE_CLIENT, {});
  ExpectOneLine(none, 2, "expected a command");
  Process unknown(ENTROPYSERVE_CLIENT, {"fly"});
  ExpectOneLine(unknown, 2, "no such command: fly");
  Process flag(ENTROPYSERVE_CLIENT, {"generate", "x", "--colour=red"});
  ExpectOneLine(flag, 2, "--colour: no such flag");
  Process raw(ENTROPYSERVE_CLIENT, {"generate", "--raw", "--system=be brief", "hello"});
  ExpectOneLine(raw, 2, "--system: plain text has no system message");
  Process ids(ENTROPYSERVE_CLIENT, {"generate", "--token-ids=1,2", "--system=be brief"});
  ExpectOneLine(ids, 2, "--system: --token-ids is the whole prompt");
  const std::string latin = ::testing::TempDir() + "/latin.txt";
  std::ofstream(latin) << "caf\xE9";
  Process piped(ENTROPYSERVE_CLIENT, {"generate"}, "caf\xE9");
  ExpectOneLine(piped, 2, "standard input is not UTF-8");
  for (const auto& [args, part] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"generate", "--file=/no/such/file"}, "--file: cannot read /no/such/file"},
           {{"generate", "--file=" + latin}, "--file: " + latin + " is not UTF-8; convert it"},
           {{"tokenize", "--file=" + latin}, "--file: " + latin + " is not UTF-8"},
           {{"generate", "caf\xE9"}, "the prompt's text is not UTF-8"},
           {{"generate", "--system=caf\xE9", "x"}, "--system: the text is not UTF-8"},
           {{"generate", ""}, "the prompt is empty"},
           {{"generate"}, "the prompt is empty"},
           {{"generate", "--raw", "--thinking=true", "x"}, "--thinking: "},
           {{"generate", "--parse-special", "x"}, "--parse-special: a message's"},
           {{"generate", "--ignore-eos", "--kv-keep-sinks", "--top-k=x", "x"}, "--top-k: "},
           {{"generate", "--token-ids=1,x"}, "--token-ids: expected"},
           {{"generate", "--token-ids=1,2", "x"}, "the prompt's text: --token-ids is the whole"},
           {{"generate", "--server=", "x"}, "--server: expected HOST:PORT"},
           {{"generate", "--attempts=0", "x"}, "--attempts: expected at least 1"},
           {{"generate", "--deadline-seconds=-1", "x"}, "--deadline-seconds: expected 0"},
           {{"generate", "--tls-ca=/no/such/file", "x"}, "--tls-ca: cannot read /no/such/file"},
           {{"generate", "--tls-cert=/no/such/file", "x"}, "--tls-cert and --tls-key"},
           {{"generate", "two", "words"}, "quote a text"},
           {{"inspect", "--output=/no/such/page.html", "x"}, "--output: cannot write"},
           {{"eval", "--html=/no/such/page.html"}, "--html: cannot write"},
           {{"chat", "word"}, "everything here is a flag"}}) {
    Process wrong(ENTROPYSERVE_CLIENT, args);
    ExpectOneLine(wrong, 2, part);
  }
  // Port 1 is never served; one attempt, so that the test does not wait for retries.
  const std::string page = ::testing::TempDir() + "/never.html";
  Process unread(ENTROPYSERVE_CLIENT,
                 {"inspect", "--server=127.0.0.1:1", "--attempts=1", "--output=" + page, "x"});
  ExpectOneLine(unread, 1, "UNAVAILABLE");
  EXPECT_FALSE(std::filesystem::exists(page));
  Process away(ENTROPYSERVE_CLIENT, {"models", "--server=127.0.0.1:1", "--attempts=1"});
  ExpectOneLine(away, 1, "UNAVAILABLE");
}

// --- A served model ---

TEST(ProgramsTest, ServesGeneratesAndDrains) {
  ServedProgram server;
  Process busy(ENTROPYSERVE, {"--model=" + MakeTinyModel().string(), "--listen=" + server.address(),
                              "--metrics-listen="});
  ExpectOneLine(busy, 1, "--listen: cannot listen on " + server.address());
  Process busy_metrics(ENTROPYSERVE, {"--model=" + MakeTinyModel().string(), "--listen=127.0.0.1:0",
                                      "--metrics-listen=" + server.address()});
  ExpectOneLine(busy_metrics, 1, "--metrics-listen: cannot listen");

  const auto models = server.Client({"models"});
  EXPECT_EQ(models->Wait(), 0) << models->err();
  EXPECT_THAT(models->out(), HasSubstr("ChatML"));

  const auto ids = server.Client({"tokenize", "a b"});
  EXPECT_EQ(ids->Wait(), 0);
  EXPECT_EQ(ids->out(), "64,94,65\n");
  const auto text = server.Client({"detokenize"}, "64,94,65\n");
  EXPECT_EQ(text->Wait(), 0);
  EXPECT_EQ(text->out(), "a b\n");

  const std::vector<std::string> greedy = {
      "generate", "--temperature=0", "--ignore-eos=true", "--max-new-tokens=8", "--json", "Hello"};
  const auto first = server.Client(greedy), second = server.Client(greedy);
  EXPECT_EQ(first->Wait(), 0) << first->err();
  EXPECT_EQ(second->Wait(), 0) << second->err();
  const auto tokens_of = [](const std::string& lines) {
    std::vector<int> ids;
    std::istringstream stream(lines);
    for (std::string line; std::getline(stream, line);) {
      const auto event = nlohmann::json::parse(line);
      if (!event.contains("tokens") || !event["tokens"].contains("ids")) continue;
      for (const int id : event["tokens"]["ids"]) ids.push_back(id);
    }
    return ids;
  };
  EXPECT_EQ(tokens_of(first->out()).size(), 8u);
  EXPECT_EQ(tokens_of(first->out()), tokens_of(second->out()));

  const auto wrong = server.Client({"generate", "x", "--top-p=2"});
  ExpectOneLine(*wrong, 1, "INVALID_ARGUMENT: sampling.top_p");
  const auto long_prompt = server.Client({"generate"}, std::string(2000, 'a'));
  ExpectOneLine(*long_prompt, 1, "INVALID_ARGUMENT: prompt:");

  // A full disk is no success, and ends the request.
  for (const bool json : {false, true}) {
    Process full(
        ENTROPYSERVE_CLIENT,
        {"generate", "--server=" + server.address(), "--raw", "--ignore-eos=true",
         "--max-new-tokens=400", "--receipt=false", json ? "--json=true" : "--json=false", "x"},
        "", "/dev/full");
    ExpectOneLine(full, 1, "standard output cannot be written");
  }
  const auto full_help = std::make_unique<Process>(
      ENTROPYSERVE_CLIENT, std::vector<std::string>{"models", "--server=" + server.address()}, "",
      "/dev/full");
  ExpectOneLine(*full_help, 1, "standard output cannot be written");

  // A signal while an answer is on its way: it is finished, and the server leaves in peace.
  const auto running = server.Client(
      {"generate", "--raw", "--ignore-eos=true", "--max-new-tokens=400", "--json", "x"});
  ASSERT_TRUE(WaitUntil([&] { return running->out().find("tokens") != std::string::npos; }));
  server.process().Signal(SIGTERM);
  EXPECT_EQ(running->Wait(), 0) << running->err();
  EXPECT_THAT(running->out(), HasSubstr("FINISH_REASON_LENGTH"));
  EXPECT_EQ(server.process().Wait(), 0);
  EXPECT_THAT(server.process().err(), HasSubstr(" stopped"));
}

TEST(ProgramsTest, AcceptsConnectionsAgainAfterItsDescriptorsRanOut) {
  constexpr int kFiles = 64;
  ServedProgram server({}, kFiles);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(server.port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::vector<int> sockets(2 * kFiles);
  for (int& fd : sockets) {
    fd = socket(AF_INET, SOCK_STREAM, 0);
    ASSERT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  // A connection that is served begins with the server's settings; the last is refused.
  char byte = 0;
  pollfd last = {.fd = sockets.back(), .events = POLLIN, .revents = 0};
  ASSERT_EQ(poll(&last, 1, 60000), 1) << "neither served nor refused";
  EXPECT_LE(recv(sockets.back(), &byte, 1, 0), 0);
  for (const int fd : sockets) close(fd);
  ASSERT_TRUE(WaitUntil([&] { return server.Client({"models"})->Wait() == 0; }));
  server.process().Signal(SIGTERM);
  EXPECT_EQ(server.process().Wait(), 0);
  EXPECT_THAT(server.process().err(), HasSubstr("connections_refused"));
}

TEST(ProgramsTest, SessionsAreMadeFoundAndDeleted) {
  ServedProgram server;
  const auto made = server.Client({"session", "create", "--json"});
  EXPECT_EQ(made->Wait(), 0) << made->err();
  const std::string id = nlohmann::json::parse(made->out())["id"];
  const auto forked = server.Client({"session", "fork", id, "--json"});
  EXPECT_EQ(forked->Wait(), 0) << forked->err();
  const std::string fork_id = nlohmann::json::parse(forked->out())["id"];
  const auto list = server.Client({"session", "list"});
  EXPECT_EQ(list->Wait(), 0);
  EXPECT_THAT(list->out(), AllOf(HasSubstr(id), HasSubstr(fork_id)));
  const auto some = server.Client({"session", "get", "nobodys", id, "--json"});
  ExpectOneLine(*some, 1, "NOT_FOUND: nobodys: session_id: no such session");
  EXPECT_THAT(some->out(), HasSubstr(id)) << "the others are tried";
  const auto deleted = server.Client({"session", "delete", id, "nobodys", fork_id});
  ExpectOneLine(*deleted, 1, "NOT_FOUND: nobodys: ");
  EXPECT_EQ(deleted->out(), "deleted " + id + "\ndeleted " + fork_id + "\n");
  const auto none = server.Client({"session", "list"});
  EXPECT_EQ(none->Wait(), 0);
  EXPECT_EQ(none->out(), "no sessions\n");
  const auto gone = server.Client({"session", "get", id});
  ExpectOneLine(*gone, 1, "NOT_FOUND");
  const auto missing = server.Client({"session", "get"});
  ExpectOneLine(*missing, 2, "expected a session's id");
  const auto action = server.Client({"session", "burn"});
  ExpectOneLine(*action, 2, "expected one of create, list");
}

class InterruptedBenchTest : public ::testing::TestWithParam<int> {};

TEST_P(InterruptedBenchTest, ReportsWhatItHas) {
  ServedProgram server;
  const auto bench = server.Client({"bench", "--json", "--requests=1000000", "--input-len=20",
                                    "--output-len=uniform:1-4", "--turns=2"});
  const auto completed = [&server] {
    const auto models = server.Client({"models", "--json"});
    EXPECT_EQ(models->Wait(), 0) << models->err();
    const std::string lines = models->out();
    const auto load = nlohmann::json::parse(lines.substr(lines.find('\n') + 1))["load"];
    return load.contains("completed") ? std::stoll(load["completed"].get<std::string>()) : 0;
  };
  ASSERT_TRUE(WaitUntil([&] { return bench->Ended() || completed() >= 4; }));
  bench->Signal(GetParam());
  bench->Signal(GetParam());  // as timeout(1) does
  EXPECT_EQ(bench->Wait(), 130) << bench->err();
  const auto report = nlohmann::json::parse(bench->out());
  EXPECT_EQ(report["ended"], "the run was interrupted");
  EXPECT_GE(report["rows"][0]["completed"], 3);
  const auto sessions = server.Client({"session", "list"});
  EXPECT_EQ(sessions->Wait(), 0);
  EXPECT_EQ(sessions->out(), "no sessions\n");
}

INSTANTIATE_TEST_SUITE_P(Signals, InterruptedBenchTest, ::testing::Values(SIGINT, SIGTERM));

TEST(ProgramsTest, InspectDrawsWhatTheServerTraced) {
  ServedProgram server;
  const fs::path folder = fs::path(::testing::TempDir()) / ("inspect_" + std::to_string(getpid()));
  fs::create_directories(folder);
  const std::string live = folder / "live.html", again = folder / "again.html";
  const std::string trace = folder / "trace.json";
  const std::vector<std::string> saved = {"inspect", "--trace-file=" + trace, "--output=" + again};
  const std::string prompt(450, 'q');
  const auto asked = server.Client(
      {"inspect", "--raw", "--ignore-eos=true", "--max-new-tokens=20", "--prefill-dense-prefix=128",
       "--prefill-dense-suffix=0", "--prefill-segment-tokens=128", "--prefill-base=136",
       "--prefill-first-sparse-layer=0", "--kv-budget=64", "--output=" + live,
       "--save-trace=" + trace},
      prompt);
  EXPECT_EQ(asked->Wait(), 0) << asked->err();
  EXPECT_THAT(asked->err(), HasSubstr("wrote " + live));

  // Segments 1 to 3 are sparse and read 17 blocks where they see so many; every head keeps its
  // budget, sinks and window first of all.
  int layers = 0;
  std::string first_layer_only;
  std::istringstream events(ReadAll(trace));
  for (std::string line; std::getline(events, line);) {
    const auto event = nlohmann::json::parse(line);
    EXPECT_FALSE(event.contains("tokens"));
    if (!event.contains("trace") || layers == 0) first_layer_only += line + "\n";
    if (!event.contains("trace")) continue;
    const auto& layer = event["trace"];
    ++layers;
    EXPECT_EQ(layer["selected"].size(), layer["entropy"].size());
    EXPECT_EQ(layer["selected"][0], -1);
    EXPECT_EQ(layer["selected"][1], 16);
    EXPECT_GE(layer["selected"][2], 17);
    for (const auto& kept : layer["kept"]) {
      EXPECT_EQ(kept["positions"].size(), 64u);
      EXPECT_EQ(kept["positions"][3], 3);
    }
    EXPECT_EQ(layer["kept"].size(), layer["kv_heads"]);
  }
  EXPECT_GT(layers, 1);

  Process redrawn(ENTROPYSERVE_CLIENT, saved);
  EXPECT_EQ(redrawn.Wait(), 0) << redrawn.err();
  EXPECT_EQ(ReadAll(live), ReadAll(again));
  EXPECT_EQ(ReadAll(live).find("qqqq"), std::string::npos);
  std::ofstream(trace, std::ios::app) << "no event\n";
  Process broken(ENTROPYSERVE_CLIENT, saved);
  ExpectOneLine(broken, 2, "expected one event as JSON");
  std::ofstream(trace) << first_layer_only;
  Process incomplete(ENTROPYSERVE_CLIENT, saved);
  ExpectOneLine(incomplete, 2, "--trace-file: " + trace + ": the trace has 1 of ");
  Process missing(ENTROPYSERVE_CLIENT, {"inspect", "--trace-file=/no/such/trace"});
  ExpectOneLine(missing, 2, "/no/such/trace");
  Process both(ENTROPYSERVE_CLIENT, {"inspect", "a prompt", "--trace-file=" + trace});
  ExpectOneLine(both, 2, "--trace-file draws a saved trace");
}

TEST(ProgramsTest, ChatAnswersEveryLineAndFlagsComeFromTheEnvironment) {
  setenv("ENTROPYSERVE_DRAIN_SECONDS", "1", 1);
  ServedProgram server;
  const auto chat = server.Client({"chat", "--max-new-tokens=5", "--temperature=0"},
                                  "hello\nagain\n/receipt\n/quit\n");
  EXPECT_EQ(chat->Wait(), 0) << chat->err();
  const std::string out = chat->out();
  EXPECT_GE(std::count(out.begin(), out.end(), '\n'), 2);
  EXPECT_THAT(chat->err(), HasSubstr("generated"));
  server.process().Signal(SIGINT);
  EXPECT_EQ(server.process().Wait(), 0);
  EXPECT_THAT(server.process().err(), HasSubstr("draining open_calls=0 seconds=1"));
  unsetenv("ENTROPYSERVE_DRAIN_SECONDS");
}

// As if it had not been: the next turn brings the system message, as in a conversation without it.
TEST(ProgramsTest, ARefusedTurnDoesNotEndTheChat) {
  ServedProgram server;
  const std::string next = "hello\n/receipt\n";
  std::string prompts[2];
  for (const bool refused : {false, true}) {
    const auto chat =
        server.Client({"chat", "--system=abc", "--max-new-tokens=5", "--temperature=0"},
                      (refused ? std::string(2000, 'a') + "\n" : "") + next);
    EXPECT_EQ(chat->Wait(), 0) << chat->err();
    const std::string err = chat->err();
    EXPECT_EQ(err.find("INVALID_ARGUMENT") != std::string::npos, refused) << err;
    const size_t line = err.rfind("tokens  ");
    ASSERT_NE(line, std::string::npos) << err;
    prompts[refused] = err.substr(line, err.find("cached", line) - line);
  }
  EXPECT_EQ(prompts[0], prompts[1]);
  const auto last = server.Client({"chat", "--max-new-tokens=5"}, std::string(2000, 'a') + "\n");
  EXPECT_EQ(last->Wait(), 1) << "how the last turn ended";
}

TEST(ProgramsTest, CtrlCAtThePromptDeletesTheSession) {
  ServedProgram server;
  const std::string fifo = ::testing::TempDir() + "/chat_" + std::to_string(getpid());
  unlink(fifo.c_str());
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  const int input = open(fifo.c_str(), O_RDWR);
  Process chat(ENTROPYSERVE_CLIENT, {"chat", "--max-new-tokens=3", "--server=" + server.address()},
               "", "", fifo);
  const std::string line = "hello\n";
  ASSERT_EQ(write(input, line.data(), line.size()), ssize_t(line.size()));
  // The line that ends an answer: the turn is over.
  ASSERT_TRUE(WaitUntil([&] { return chat.Ended() || chat.out().ends_with("\n"); }));
  const auto sessions = [&] {
    const auto list = server.Client({"session", "list", "--json"});
    EXPECT_EQ(list->Wait(), 0) << list->err();
    return list->out();
  };
  EXPECT_THAT(sessions(), HasSubstr("\"id\""));
  // The first Ctrl-C may still meet the turn's last moment and only stop it.
  EXPECT_TRUE(WaitUntil([&] {
    if (!chat.Ended()) chat.Signal(SIGINT);
    return chat.Ended();
  }));
  EXPECT_EQ(chat.Wait(), 130) << chat.err();
  EXPECT_EQ(sessions(), "");
  close(input);
  unlink(fifo.c_str());
}

}  // namespace
}  // namespace entropyserve
