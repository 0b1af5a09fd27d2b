#include "engine/weights/safetensors_header.h"

#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace entropyserve {
namespace {

// Dimensions per tensor: real ones have at most four.
constexpr size_t kMaxDims = 8;

// Event handler for nlohmann's parser. A document tree would let a hostile header of 16 MiB grow to
// twenty times that, and would hide repeated keys; events keep only what a header may contain.
class HeaderHandler {
 public:
  explicit HeaderHandler(SafetensorsHeader* header) : header_(header) {}

  const std::string& error() const { return error_; }

  bool null() { return Fail("null"); }
  bool boolean(bool) { return Fail("a boolean"); }
  bool number_float(double, const std::string&) { return Fail("a number with a fraction"); }
  bool binary(std::vector<uint8_t>&) { return Fail("binary data"); }
  bool number_integer(int64_t) { return Fail("a negative number"); }

  bool number_unsigned(uint64_t x) {
    if (state_ != State::kList) return Fail("a number");
    const size_t limit = list_ == &tensor_.shape ? kMaxDims : 2;
    if (list_->size() >= limit) return Error(absl::StrCat("'", field_, "' is too long"));
    if (x > uint64_t{INT64_MAX}) return Error(absl::StrCat("'", field_, "' is out of range"));
    list_->push_back(int64_t(x));
    return true;
  }

  bool string(std::string& s) {
    if (state_ == State::kMetadata) {
      header_->metadata[field_] = std::move(s);
      return true;
    }
    if (state_ != State::kTensor || field_ != "dtype") return Fail("a string");
    tensor_.dtype = std::move(s);
    return true;
  }

  bool start_object(size_t) {
    switch (state_) {
      case State::kStart:
        state_ = State::kTop;
        return true;
      case State::kTop:
        fields_.clear();
        if (tensor_.name == "__metadata__") {
          state_ = State::kMetadata;
        } else {
          state_ = State::kTensor;
          tensor_.dtype.clear();
          tensor_.shape.clear();
          tensor_.data_offsets.clear();
        }
        return true;
      default:
        return Fail("an object");
    }
  }

  bool end_object() {
    if (state_ == State::kTop) return true;  // the end of the document
    if (state_ == State::kTensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!fields_.contains(field)) return Error(absl::StrCat("'", field, "' is missing"));
      }
      if (tensor_.data_offsets.size() != 2) return Error("'data_offsets' is not a pair");
      header_->tensors.push_back(tensor_);
    }
    state_ = State::kTop;
    field_.clear();
    return true;
  }

  bool key(std::string& name) {
    if (state_ == State::kTop) {
      tensor_.name = std::move(name);
      return names_.insert(tensor_.name).second || Error("the name occurs twice");
    }
    field_ = std::move(name);
    if (!fields_.insert(field_).second) return Error(absl::StrCat("'", field_, "' occurs twice"));
    if (state_ == State::kMetadata || field_ == "dtype" || field_ == "shape" ||
        field_ == "data_offsets") {
      return true;
    }
    return Error(absl::StrCat("unknown field '", field_, "'"));
  }

  bool start_array(size_t) {
    if (state_ != State::kTensor || field_ == "dtype") return Fail("an array");
    list_ = field_ == "shape" ? &tensor_.shape : &tensor_.data_offsets;
    state_ = State::kList;
    return true;
  }

  bool end_array() {
    state_ = State::kTensor;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) {
    error_ = absl::StrCat("the header is not JSON at byte ", position);
    return false;
  }

 private:
  enum class State { kStart, kTop, kMetadata, kTensor, kList };

  bool Error(const std::string& what) {
    error_ = absl::StrCat("tensor '", tensor_.name, "': ", what);
    return false;
  }
  bool Fail(const char* what) {
    return Error(absl::StrCat("unexpected ", what, field_.empty() ? "" : " in '", field_,
                              field_.empty() ? "" : "'"));
  }

  SafetensorsHeader* const header_;
  State state_ = State::kStart;
  SafetensorsHeader::Tensor tensor_;  // being read
  std::vector<int64_t>* list_ = nullptr;
  std::string field_;
  std::set<std::string> names_, fields_;
  std::string error_;
};

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view json,
                                                         const std::string& file) {
  SafetensorsHeader header;
  HeaderHandler handler(&header);
  if (!nlohmann::json::sax_parse(json.begin(), json.end(), &handler)) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": ", handler.error()));
  }
  return header;
}

}  // namespace entropyserve
