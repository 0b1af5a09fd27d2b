// Session files: what was written comes back, and nothing else ever does; claims and recovery.
#include "engine/sessions/session_file.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "engine/sessions/session_dir.h"

namespace entropyserve {
namespace {

namespace fs = std::filesystem;

const ByteMeter kMeter = std::make_shared<std::atomic<int64_t>>(0);

SessionRecord MakeRecord(const std::string& id) {
  SessionRecord record{.model = "model",
                       .id = id,
                       .owner = OwnerDigest("ann"),
                       .kv_policy = "latent",
                       .dtype = DType::kBF16,
                       .layers = 2,
                       .kv_heads = 1,
                       .head_dim = 4,
                       .cache = {.lengths = {70, 3}, .position = 90, .ever_compressed = true},
                       .turns = 3,
                       .pending = {5, 6, 7}};
  record.seen.assign(77, false);
  record.seen[3] = record.seen[76] = true;
  return record;
}

std::vector<std::byte> MakePages(const SessionRecord& record) {
  std::vector<std::byte> pages(size_t(record.kv_bytes()));
  std::mt19937 random(7);
  for (std::byte& b : pages) b = std::byte(random() & 255);
  return pages;
}

std::string Bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void Put(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), bytes.size());
}

class SessionFileTest : public testing::Test {
 protected:
  SessionFileTest() {
    std::string name = testing::TempDir() + "/session_file.XXXXXX";
    folder_ = mkdtemp(name.data());
  }
  ~SessionFileTest() override { fs::remove_all(folder_); }

  // A whole file that nobody has claimed.
  void Write(SessionDir* dir, const std::string& id) {
    const SessionRecord record = MakeRecord(id);
    const std::string temporary = dir->NewTemporaryPath(id);
    ASSERT_TRUE(WriteSessionFile(temporary, record, MakePages(record)).ok());
    ASSERT_TRUE(dir->Publish(temporary, id).ok());
  }

  // The folder as a machine finds it after all its servers were killed at this moment: a copy has
  // no locks.
  std::string AfterKill() {
    const std::string copy = folder_ + "/../" + fs::path(folder_).filename().string() + ".killed";
    fs::remove_all(copy);
    fs::copy(folder_, copy, fs::copy_options::recursive);
    return copy;
  }

  std::string folder_;
  const std::string a_ = std::string(31, 'a') + "1", b_ = std::string(31, 'b') + "2",
                    c_ = std::string(31, 'c') + "3";
};

TEST_F(SessionFileTest, GivesBackWhatWasWritten) {
  const SessionRecord record = MakeRecord(a_);
  const std::vector<std::byte> pages = MakePages(record);
  const std::string path = folder_ + "/file";
  ASSERT_TRUE(WriteSessionFile(path, record, pages).ok());
  EXPECT_EQ(int64_t(fs::file_size(path)), SessionFileBytes(record));
  EXPECT_EQ(Bytes(path).find("ann"), std::string::npos) << "owners are not stored in the clear";
  const auto header = ReadSessionHeader(path);
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_FALSE(header->marker);
  const auto session = ReadSessionFile(path, kMeter);
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(*kMeter, session->pages->size());
  for (const SessionRecord& r : {header->record, session->record}) {
    EXPECT_EQ(r.model, record.model);
    EXPECT_EQ(r.id, record.id);
    EXPECT_EQ(r.owner, record.owner);
    EXPECT_EQ(r.kv_policy, record.kv_policy);
    EXPECT_EQ(r.dtype, record.dtype);
    EXPECT_EQ(r.head_dim, record.head_dim);
    EXPECT_EQ(r.cache, record.cache);
    EXPECT_EQ(r.turns, record.turns);
    EXPECT_EQ(r.pending, record.pending);
  }
  EXPECT_EQ(session->record.seen, record.seen);
  EXPECT_EQ(std::vector<std::byte>(session->pages->data(),
                                   session->pages->data() + session->pages->size()),
            pages);
}

TEST_F(SessionFileTest, NoTornFileIsRead) {
  const SessionRecord record = MakeRecord(a_);
  const std::string path = folder_ + "/file", torn = folder_ + "/torn";
  ASSERT_TRUE(WriteSessionFile(path, record, MakePages(record)).ok());
  const std::string bytes = Bytes(path);
  int markers = 0;
  for (size_t size = 0; size < bytes.size(); ++size) {
    Put(torn, bytes.substr(0, size));
    const auto header = ReadSessionHeader(torn);
    ASSERT_TRUE(!header.ok() || header->marker) << size << " bytes";
    markers += header.ok();
    ASSERT_TRUE(absl::IsDataLoss(ReadSessionFile(torn, kMeter).status())) << size << " bytes";
  }
  EXPECT_EQ(markers, 1);
  Put(torn, bytes + "x");
  EXPECT_TRUE(absl::IsDataLoss(ReadSessionFile(torn, kMeter).status()));
  EXPECT_EQ(*kMeter, 0);
}

TEST_F(SessionFileTest, NoFlippedBitIsRead) {
  const SessionRecord record = MakeRecord(a_);
  const std::string path = folder_ + "/file", flipped = folder_ + "/flipped";
  ASSERT_TRUE(WriteSessionFile(path, record, MakePages(record)).ok());
  const std::string bytes = Bytes(path);
  std::mt19937 random(3);
  constexpr int kFlips = 3000;
  for (int i = 0; i < kFlips; ++i) {
    std::string wrong = bytes;
    // Every byte of the header, then anywhere.
    const size_t at = i < 400 ? size_t(i) : random() % bytes.size();
    wrong[at] = char(wrong[at] ^ (1 << (random() % 8)));
    Put(flipped, wrong);
    ASSERT_FALSE(ReadSessionFile(flipped, kMeter).ok()) << "byte " << at;
  }
  EXPECT_EQ(*kMeter, 0);
}

TEST_F(SessionFileTest, OneOfTwoServersGetsAClaim) {
  auto one = *SessionDir::Open(folder_), two = *SessionDir::Open(folder_);
  Write(one.get(), a_);
  EXPECT_EQ(two->List().size(), 1u);
  EXPECT_TRUE(two->Claim(a_).ok());
  EXPECT_TRUE(absl::IsNotFound(one->Claim(a_)));
  const auto found = one->Find(a_);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_TRUE(found->elsewhere);
  EXPECT_TRUE(two->Unclaim(a_).ok());
  EXPECT_FALSE(one->Find(a_)->elsewhere);
  EXPECT_TRUE(one->Claim(a_).ok());
  one->RemoveClaimed(a_);
  EXPECT_TRUE(absl::IsNotFound(two->Find(a_).status()));
  EXPECT_TRUE(absl::IsNotFound(two->Find("../../etc/passwd").status()));
}

// At once for those who start, and when they are asked for by those who run already.
TEST_F(SessionFileTest, WhatDeadServersHeldComesBackUnlessItHadChanged) {
  auto alive = SessionDir::Open(folder_);
  ASSERT_TRUE(alive.ok()) << alive.status();
  for (const std::string& id : {a_, b_, c_}) Write(alive->get(), id);
  ASSERT_TRUE((*alive)->Claim(a_).ok());
  ASSERT_TRUE((*alive)->Claim(b_).ok());
  (*alive)->MakeMarker(b_);
  (*alive)->MakeMarker(b_);
  Put((*alive)->NewTemporaryPath(c_), "half a file");
  const std::string copy = AfterKill();
  auto dir = *SessionDir::Open(copy);
  EXPECT_EQ(dir->List().size(), 2u) << "a's whole claim is back, c was free";
  EXPECT_TRUE(absl::IsNotFound(dir->Find(b_).status()));
  const std::vector<SessionRecord> lost = dir->TakeLost();
  ASSERT_EQ(lost.size(), 1u);
  EXPECT_EQ(lost[0].id, b_);
  EXPECT_EQ(lost[0].owner, OwnerDigest("ann"));
  dir.reset();
  int left = 0;
  for (const auto& entry : fs::recursive_directory_iterator(copy)) left += entry.is_regular_file();
  EXPECT_EQ(left, 2) << "a and c; no locks, no halves, no markers";
  fs::remove_all(copy);
  // The living server's claims are untouched.
  EXPECT_TRUE((*SessionDir::Open(folder_))->Find(a_)->elsewhere);
  // It ends without a word: its folder's lock is free, as after a kill.
  auto late = *SessionDir::Open(folder_);
  *alive = nullptr;
  EXPECT_FALSE(late->Find(a_)->elsewhere);
}

TEST_F(SessionFileTest, DamagedFilesAreRemoved) {
  auto dir = *SessionDir::Open(folder_);
  Write(dir.get(), a_);
  Write(dir.get(), b_);
  std::string bytes = Bytes(folder_ + "/" + a_ + ".session");
  bytes[40] ^= 1;
  Put(folder_ + "/" + a_ + ".session", bytes);
  fs::copy(folder_ + "/" + b_ + ".session", folder_ + "/" + c_ + ".session");  // another's name
  EXPECT_EQ(dir->List().size(), 1u);
  EXPECT_FALSE(fs::exists(folder_ + "/" + a_ + ".session"));
  EXPECT_FALSE(fs::exists(folder_ + "/" + c_ + ".session"));
}

TEST_F(SessionFileTest, AFolderThatCannotBeUsedNamesTheFlag) {
  Put(folder_ + "/file", "x");
  for (const std::string& path : {folder_ + "/none", folder_ + "/file"}) {
    const absl::Status status = SessionDir::Open(path).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(status.message().find("--session-dir"), absl::string_view::npos);
  }
}

}  // namespace
}  // namespace entropyserve
