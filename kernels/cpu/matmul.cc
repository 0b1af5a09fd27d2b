#include "kernels/cpu/matmul.h"

#include <dnnl.hpp>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kernels/check.h"

namespace entropyserve {
namespace {

struct HashShape {
  size_t operator()(const MatmulShape& s) const {
    uint64_t h = (uint64_t(s.in) << 4) | (uint64_t(s.out) << 3) | (uint64_t(s.b_transposed) << 2) |
                 (uint64_t(s.accumulate) << 1) | uint64_t(s.bias);
    for (int64_t v : {s.m, s.n, s.k, s.lda, s.ldb, s.ldc}) {
      h = (h ^ uint64_t(v)) * 0x9e3779b97f4a7c15u;
      h ^= h >> 29;
    }
    return size_t(h);
  }
};

dnnl::memory::data_type DataType(DType dtype) {
  return dtype == DType::kF32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

// A compiled product with the memory objects that carry its arguments.
struct Product {
  MatmulShape shape;
  dnnl::matmul primitive;
  dnnl::memory a, b, c, bias;
  size_t scratch_bytes = 0;
  std::unordered_map<int, dnnl::memory> args;

  Product(const MatmulShape& s, const dnnl::engine& engine) : shape(s) {
    using dnnl::memory;
    using Dims = memory::dims;
    const memory::desc a_desc({s.m, s.k}, DataType(s.in), Dims{s.lda, 1});
    const memory::desc b_desc({s.k, s.n}, DataType(s.in),
                              s.b_transposed ? Dims{1, s.ldb} : Dims{s.ldb, 1});
    const memory::desc c_desc({s.m, s.n}, DataType(s.out), Dims{s.ldc, 1});
    const memory::desc bias_desc({1, s.n}, memory::data_type::f32, Dims{s.n, 1});
    dnnl::primitive_attr attr;
    // Our own scratch: the library's belongs to the thread that made the primitive.
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (s.accumulate) {
      dnnl::post_ops ops;
      ops.append_sum(1.0f);
      attr.set_post_ops(ops);
    }
    const auto desc = s.bias ? dnnl::matmul::desc(a_desc, b_desc, bias_desc, c_desc)
                             : dnnl::matmul::desc(a_desc, b_desc, c_desc);
    const dnnl::matmul::primitive_desc compiled(desc, attr, engine);
    primitive = dnnl::matmul(compiled);
    scratch_bytes = compiled.scratchpad_desc().get_size();
    a = memory(a_desc, engine, nullptr);
    b = memory(b_desc, engine, nullptr);
    c = memory(c_desc, engine, nullptr);
    args = {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}};
    if (s.bias) {
      bias = memory(bias_desc, engine, nullptr);
      args.emplace(DNNL_ARG_BIAS, bias);
    }
    if (scratch_bytes > 0) {
      args.emplace(DNNL_ARG_SCRATCHPAD, memory(compiled.scratchpad_desc(), engine, nullptr));
    }
  }
};

// oneDNN 2.6 multiplies bf16 on CPUs with AVX-512 only.
bool HasBF16(const dnnl::engine& engine) {
  using dnnl::memory;
  const memory::desc desc({16, 16}, memory::data_type::bf16, memory::dims{16, 1});
  const memory::desc out({16, 16}, memory::data_type::f32, memory::dims{16, 1});
  try {
    dnnl::matmul::primitive_desc(dnnl::matmul::desc(desc, desc, out), engine);
    return true;
  } catch (const dnnl::error&) {
    return false;
  }
}

// Rows of bf16, `stride` apart, as floats that lie together; and back.
void Widen(const bf16_t* x, int64_t rows, int64_t cols, int64_t stride, std::vector<float>& out) {
  out.resize(size_t(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out[size_t(r * cols + c)] = FromBF16(x[r * stride + c]);
  }
}
void Narrow(const std::vector<float>& x, int64_t rows, int64_t cols, bf16_t* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out[r * stride + c] = ToBF16(x[size_t(r * cols + c)]);
  }
}

// oneDNN keeps generated code in a cache of the process and orders access to it in ways that TSan,
// which does not see into the library, takes for races. Compiling is rare: one thread at a time
// does.
std::mutex& CompileMutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

struct Matmul::Impl {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::list<Product> products;  // most recently used first
  std::unordered_map<MatmulShape, std::list<Product>::iterator, HashShape> index;
  std::vector<std::byte> scratch;
  const bool has_bf16 = HasBF16(engine);
  std::vector<float> a32, b32, c32;  // for CPUs without

  Product& Find(const MatmulShape& shape) {
    if (!products.empty() && products.front().shape == shape) return products.front();
    if (auto it = index.find(shape); it != index.end()) {
      products.splice(products.begin(), products, it->second);
      return products.front();
    }
    if (products.size() >= size_t(kMaxCached)) {
      std::lock_guard lock(CompileMutex());
      index.erase(products.back().shape);
      products.pop_back();
    }
    {
      std::lock_guard lock(CompileMutex());
      products.emplace_front(shape, engine);
    }
    index.emplace(shape, products.begin());
    return products.front();
  }
};

Matmul::Matmul() {
  std::lock_guard lock(CompileMutex());
  dnnl::set_primitive_cache_capacity(kMaxCached);
  impl_ = std::make_unique<Impl>();
}
Matmul::~Matmul() {
  std::lock_guard lock(CompileMutex());
  impl_.reset();
}
Matmul::Matmul(Matmul&&) noexcept = default;
Matmul& Matmul::operator=(Matmul&&) noexcept = default;

void Matmul::Run(const MatmulShape& shape, const void* a, const void* b, void* c,
                 const float* bias) {
  Check(shape.m > 0 && shape.n > 0 && shape.k > 0, "a matrix product has no empty side");
  Check(!shape.accumulate || (shape.out == DType::kF32 && !shape.bias), "bad matmul flags");
  if (shape.in == DType::kBF16 && !impl_->has_bf16) {
    RunWidened(shape, a, b, c, bias);
    return;
  }
  Product& product = impl_->Find(shape);
  product.a.set_data_handle(const_cast<void*>(a));
  product.b.set_data_handle(const_cast<void*>(b));
  product.c.set_data_handle(c);
  if (shape.bias) product.bias.set_data_handle(const_cast<float*>(bias));
  if (product.scratch_bytes > 0) {
    constexpr size_t kAlign = 64;
    if (impl_->scratch.size() < product.scratch_bytes + kAlign) {
      impl_->scratch.resize(product.scratch_bytes + kAlign);
    }
    const auto address = reinterpret_cast<uintptr_t>(impl_->scratch.data());
    product.args.at(DNNL_ARG_SCRATCHPAD)
        .set_data_handle(reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign));
  }
  product.primitive.execute(impl_->stream, product.args);
}

void Matmul::RunWidened(const MatmulShape& shape, const void* a, const void* b, void* c,
                        const float* bias) {
  const int64_t b_rows = shape.b_transposed ? shape.n : shape.k;
  const int64_t b_cols = shape.b_transposed ? shape.k : shape.n;
  Widen(static_cast<const bf16_t*>(a), shape.m, shape.k, shape.lda, impl_->a32);
  Widen(static_cast<const bf16_t*>(b), b_rows, b_cols, shape.ldb, impl_->b32);
  MatmulShape wide = shape;
  wide.in = wide.out = DType::kF32;
  wide.lda = shape.k, wide.ldb = b_cols;
  if (shape.out == DType::kF32) {
    Run(wide, impl_->a32.data(), impl_->b32.data(), c, bias);
    return;
  }
  wide.ldc = shape.n;
  impl_->c32.resize(size_t(shape.m * shape.n));
  Run(wide, impl_->a32.data(), impl_->b32.data(), impl_->c32.data(), bias);
  Narrow(impl_->c32, shape.m, shape.n, static_cast<bf16_t*>(c), shape.ldc);
}

}  // namespace entropyserve
