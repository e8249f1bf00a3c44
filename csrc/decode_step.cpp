// Decode steps of a transformer's rows on a CPU: fastrl_decode.
//
// A step of a few rows is some hundred small operators, which take longer to start, and to wait for on several threads,
// than to compute. Here it is a list of phases (team.hpp), five a layer:
//
//   queries, keys and values    of the normed rows
//   attention                   turn the heads, put the new key and value into the cache, attend
//   output                      added to the rows
//   gate                        silu(gate) * up of the normed rows
//   down                        added to the rows
//
// then the head and the sampler, and the next step with the tokens it drew. Norms are taken by each thread for itself,
// of the block of rows whose product it computes: a phase of theirs would be one more to wait for.

#include "decode_step.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "common.hpp"
#include "kernels.hpp"
#include "sampler.hpp"
#include "team.hpp"

namespace fastrl {
namespace {

constexpr int64_t kRowBlock = 64;         // rows of one piece of a product
constexpr int64_t kTile = 12;             // columns of a piece are a multiple: of every table's tiles
constexpr int64_t kUpColumns = 4 * kTile;  // of the gate at once
constexpr int64_t kWorth = 1 << 17;       // multiplications that are worth a piece of their own
constexpr int64_t kPiecesPerThread = 4;
constexpr int64_t kQueries = 16;          // of one piece of attention, and
constexpr int64_t kScores = 1 << 18;      // scores of it, if it is more than one row

enum Result : int64_t { kNoMemory = -1, kBadRows = -2, kNoLevel = -3 };

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// How a product is cut: blocks of rows, each with columns in pieces of `width`.
struct Cut {
  int64_t blocks, pieces, width;
  Cut(int64_t rows, int64_t inputs, int64_t outputs, int threads) {
    blocks = (rows + kRowBlock - 1) / kRowBlock;
    const int64_t work = std::min(rows, kRowBlock) * inputs * outputs;
    const int64_t wanted = threads == 1 ? 1 : std::clamp<int64_t>(work / kWorth, 1, kPiecesPerThread * threads);
    width = up_to((outputs + wanted - 1) / wanted, kTile);
    pieces = (outputs + width - 1) / width;
  }
  int64_t count() const { return blocks * pieces; }
};

// Rows of one prompt that are attended for together.
struct Neighbours {
  int64_t group, from, to;
};

class Steps {
 public:
  Steps(const DecodeModel& model, const DecodeRows& rows, const Sampler* sampler, int64_t steps, int threads,
        const Kernels& kernels)
      : model_(model), rows_(rows), sampler_(sampler), steps_(steps), threads_(threads), k_(kernels),
        per_step_(5 * model.layers + 2), phases_(steps * per_step_),
        alive_(new std::atomic<int64_t>[static_cast<size_t>(steps)]()) {
    shared_ = model.query_heads / model.key_heads;
    query_width_ = model.query_heads * model.head_dim;
    key_width_ = model.key_heads * model.head_dim;
    qkv_width_ = query_width_ + 2 * key_width_;
    keys_ = rows.prompt_capacity + rows.step + steps;
    vocabulary_ = sampler ? sampler->head.outputs : 0;
    make_neighbours();
    make_room();
  }

  // Steps done.
  int64_t run(Parallel parallel) {
    for (int64_t r = 0; r < rows_.rows; ++r) embed(r);
    on_threads(parallel, threads_, [this](int thread) { walk(thread); });
    return done_;
  }

 private:
  // What one thread keeps to itself.
  struct Own {
    float *normed, *up, *queries, *scores, *shares;
    double* sums;
    int64_t phase, block;  // of which rows `normed` holds
  };

  void make_neighbours() {
    const int64_t pairs = rows_.rows * model_.key_heads;
    int64_t most = std::min({kQueries / shared_, kScores / (keys_ * shared_), pairs / (2 * threads_)});
    most = std::max<int64_t>(most, 1);
    neighbours_ = neighbours_room_.reserve(rows_.rows);
    for (int64_t g = 0; g < rows_.groups; ++g) {
      for (int64_t r = rows_.offsets[g]; r < rows_.offsets[g + 1]; r += most) {
        neighbours_[neighbours_count_++] = {g, r, std::min<int64_t>(r + most, rows_.offsets[g + 1])};
      }
    }
    queries_ = most * shared_;
  }

  void make_room() {
    const int64_t r = rows_.rows;
    int64_t intermediate = 0;
    for (int64_t i = 0; i < model_.layers; ++i) intermediate = std::max(intermediate, model_.layer[i].gate.outputs);
    x_ = x_room_.reserve(r * model_.hidden);
    qkv_ = qkv_room_.reserve(r * qkv_width_);
    mixed_ = mixed_room_.reserve(r * query_width_);
    gated_ = gated_room_.reserve(r * intermediate);
    logits_ = logits_room_.reserve(r * vocabulary_ + 1);
    own_ = own_room_.reserve(own_size() * threads_);
    sums_ = sums_room_.reserve(sums_size() * threads_);
  }

  // Multiples of 64 bytes, so that no two threads write to one cache line.
  int64_t normed_size() const { return up_to(std::min(kRowBlock, rows_.rows) * model_.hidden, 16); }
  int64_t up_size() const { return kRowBlock * kUpColumns; }
  int64_t queries_size() const { return up_to(queries_ * model_.head_dim, 16); }
  int64_t own_size() const {
    return normed_size() + up_size() + queries_size() + up_to(queries_ * keys_, 16) + up_to(queries_, 16);
  }
  int64_t sums_size() const { return up_to(std::max(blocks(vocabulary_), blocks(keys_)), 8); }

  Own own(int thread) {
    Own o;
    o.normed = own_ + own_size() * thread;
    o.up = o.normed + normed_size();
    o.queries = o.up + up_size();
    o.scores = o.queries + queries_size();
    o.shares = o.scores + up_to(queries_ * keys_, 16);
    o.sums = sums_ + sums_size() * thread;
    o.phase = o.block = -1;
    return o;
  }

  void embed(int64_t r) {
    std::memcpy(x_ + r * model_.hidden, model_.embedding + rows_.token[r] * model_.hidden,
                static_cast<size_t>(model_.hidden) * sizeof(float));
  }

  // All phases of all steps, as each thread goes through them.
  void walk(int thread) {
    Own o = own(thread);
    int64_t phase = 0;
    for (int64_t t = 0; t < steps_; ++t) {
      for (int64_t i = 0; i < model_.layers; ++i) layer(o, phase, model_.layer[i], t);
      if (!sampler_) {
        normed_out(phase);
        done_ = 1;
        return;
      }
      head(o, phase);
      phases_.run(phase++, rows_.rows, [&](int64_t r) { sample(o, r, t); });
      done_ = t + 1;
      if (alive_[static_cast<size_t>(t)] <= sampler_->stop_at) return;
    }
  }

  void layer(Own& o, int64_t& phase, const DecodeLayer& l, int64_t t) {
    const Linear* parts[] = {&l.query, &l.key, &l.value};
    product(o, phase++, parts, 3, &l.before_attention, x_, model_.hidden, false, qkv_, qkv_width_);
    phases_.run(phase++, neighbours_count_ * model_.key_heads, [&](int64_t i) {
      attend(o, l, neighbours_[i / model_.key_heads], i % model_.key_heads, t);
    });
    const Linear* output[] = {&l.output};
    product(o, phase++, output, 1, nullptr, mixed_, query_width_, true, x_, model_.hidden);
    gate(o, phase++, l);
    const Linear* down[] = {&l.down};
    product(o, phase++, down, 1, nullptr, gated_, l.down.inputs, true, x_, model_.hidden);
  }

  void head(Own& o, int64_t& phase) {
    const Linear* head[] = {&sampler_->head};
    product(o, phase++, head, 1, &model_.last, x_, model_.hidden, false, logits_, vocabulary_);
  }

  // Rows [from, to) of a block; `x`, normed if a norm is given.
  const float* input(Own& o, int64_t phase, int64_t block, const Norm* norm, const float* x, int64_t width,
                     int64_t from, int64_t to) {
    if (!norm) return x + from * width;
    if (o.phase != phase || o.block != block) {
      k_.norm(x + from * width, width, to - from, width, norm->weight, static_cast<float>(norm->eps), o.normed, width);
      o.phase = phase;
      o.block = block;
    }
    return o.normed;
  }

  // Products of the same rows side by side into `out`.
  void product(Own& o, int64_t phase, const Linear* const* parts, int count, const Norm* norm, const float* x,
               int64_t width, bool add, float* out, int64_t out_width) {
    int64_t outputs = 0;
    for (int i = 0; i < count; ++i) outputs += parts[i]->outputs;
    const Cut cut(rows_.rows, width, outputs, threads_);
    phases_.run(phase, cut.count(), [&](int64_t piece) {
      const int64_t block = piece / cut.pieces, from = piece % cut.pieces * cut.width;
      const int64_t first = block * kRowBlock, last = std::min(first + kRowBlock, rows_.rows);
      const float* rows = input(o, phase, block, norm, x, width, first, last);
      int64_t start = 0;  // of a part, among all columns
      for (int i = 0; i < count; start += parts[i++]->outputs) {
        const int64_t a = std::max(from, start) - start;
        const int64_t b = std::min(from + cut.width, start + parts[i]->outputs) - start;
        if (a < b) {
          k_.product(rows, width, last - first, *parts[i], a, b, add, out + first * out_width + start + a, out_width);
        }
      }
    });
  }

  void gate(Own& o, int64_t phase, const DecodeLayer& l) {
    const int64_t outputs = l.gate.outputs;
    const Cut cut(rows_.rows, model_.hidden, 2 * outputs, threads_);
    const int64_t width = up_to(cut.width / 2, kTile), pieces = (outputs + width - 1) / width;
    phases_.run(phase, cut.blocks * pieces, [&](int64_t piece) {
      const int64_t block = piece / pieces, first = block * kRowBlock, last = std::min(first + kRowBlock, rows_.rows);
      const int64_t from = piece % pieces * width, to = std::min(from + width, outputs);
      const float* rows = input(o, phase, block, &l.before_gate, x_, model_.hidden, first, last);
      for (int64_t c = from; c < to; c += kUpColumns) {
        const int64_t end = std::min(c + kUpColumns, to);
        float* gated = gated_ + first * outputs + c;
        k_.product(rows, model_.hidden, last - first, l.gate, c, end, false, gated, outputs);
        k_.product(rows, model_.hidden, last - first, l.up, c, end, false, o.up, kUpColumns);
        for (int64_t r = 0; r < last - first; ++r) k_.silu_mul(gated + r * outputs, o.up + r * kUpColumns, end - c);
      }
    });
  }

  // A head of a row, normed if it has a norm and turned by the row's angles, into `to`.
  void turn(const float* head, const Norm& norm, int64_t r, int64_t t, float factor, float* to) {
    const int64_t d = model_.head_dim, angle = (rows_.angle[r] + t) * (d / 2);
    if (norm.weight) {
      k_.norm(head, d, 1, d, norm.weight, static_cast<float>(norm.eps), to, d);
      head = to;
    }
    k_.rotate(head, rows_.cos + angle, rows_.sin + angle, d / 2, factor, to);
  }

  // One key head's queries of neighbouring rows over their prompt and their own keys.
  void attend(Own& o, const DecodeLayer& l, const Neighbours& n, int64_t head, int64_t t) {
    const int64_t d = model_.head_dim, own = rows_.step + t + 1, prompt = rows_.prompt_length[n.group];
    const int64_t queries = (n.to - n.from) * shared_;
    const auto own_at = [&](int64_t r) { return (r * model_.key_heads + head) * rows_.own_capacity * d; };
    for (int64_t r = n.from; r < n.to; ++r) {
      const float* qkv = qkv_ + r * qkv_width_;
      for (int64_t i = 0; i < shared_; ++i) {
        float* to = o.queries + ((r - n.from) * shared_ + i) * d;
        turn(qkv + (head * shared_ + i) * d, l.queries, r, t, static_cast<float>(l.scale), to);
      }
      const int64_t slot = own_at(r) + (own - 1) * d;
      turn(qkv + query_width_ + head * d, l.keys, r, t, 1.0f, l.own_keys + slot);
      std::memcpy(l.own_values + slot, qkv + query_width_ + key_width_ + head * d,
                  static_cast<size_t>(d) * sizeof(float));
    }
    const int64_t prompt_at = (n.group * model_.key_heads + head) * rows_.prompt_capacity * d;
    k_.product(o.queries, d, queries, Linear{l.prompt_keys + prompt_at, nullptr, d, d, prompt}, 0, prompt, false,
               o.scores, keys_);
    for (int64_t r = n.from; r < n.to; ++r) {
      const int64_t first = (r - n.from) * shared_;
      k_.product(o.queries + first * d, d, shared_, Linear{l.own_keys + own_at(r), nullptr, d, d, own}, 0, own, false,
                 o.scores + first * keys_ + prompt, keys_);
    }
    for (int64_t q = 0; q < queries; ++q) {
      float* scores = o.scores + q * keys_;
      k_.weigh(scores, prompt + own, k_.peak(scores, prompt + own), o.sums);
      double sum = 0.0;
      for (int64_t b = 0; b < blocks(prompt + own); ++b) sum += o.sums[b];
      o.shares[q] = static_cast<float>(1.0 / sum);
    }
    // The queries are used up: the outputs take their place.
    k_.mix(o.scores, keys_, queries, l.prompt_values + prompt_at, prompt, d, false, o.queries, d);
    for (int64_t r = n.from; r < n.to; ++r) {
      const int64_t first = (r - n.from) * shared_;
      k_.mix(o.scores + first * keys_ + prompt, keys_, shared_, l.own_values + own_at(r), own, d, true,
             o.queries + first * d, d);
      float* to = mixed_ + r * query_width_ + head * shared_ * d;
      for (int64_t i = 0; i < shared_ * d; ++i) to[i] = o.queries[first * d + i] * o.shares[first + i / d];
    }
  }

  void normed_out(int64_t phase) {
    phases_.run(phase, rows_.rows, [&](int64_t r) {
      const int64_t at = r * model_.hidden;
      k_.norm(x_ + at, model_.hidden, 1, model_.hidden, model_.last.weight, static_cast<float>(model_.last.eps),
              rows_.hidden + at, model_.hidden);
    });
  }

  void sample(Own& o, int64_t r, int64_t t) {
    const Sampler& s = *sampler_;
    const int64_t at = s.line[r] * s.columns + s.column + t;
    const Drawn drawn =
        draw(k_, s, logits_ + r * vocabulary_, vocabulary_, s.uniform ? s.uniform[at] : 0.0, o.sums);
    s.tokens[at] = rows_.token[r] = drawn.token;
    s.logp[at] = drawn.logp;
    if (std::find(s.ends, s.ends + s.ends_count, drawn.token) != s.ends + s.ends_count) s.alive[r] = 0;
    if (s.alive[r]) ++alive_[static_cast<size_t>(t)];
    embed(r);
  }

  const DecodeModel& model_;
  const DecodeRows& rows_;
  const Sampler* sampler_;
  const int64_t steps_;
  const int threads_;
  const Kernels& k_;
  const int64_t per_step_;
  Phases phases_;
  std::unique_ptr<std::atomic<int64_t>[]> alive_;  // rows, after each step
  std::atomic<int64_t> done_{0};

  int64_t shared_, query_width_, key_width_, qkv_width_, vocabulary_;
  int64_t keys_;                  // the most that a row sees in this call
  int64_t queries_;               // of a piece of attention
  int64_t neighbours_count_ = 0;
  Neighbours* neighbours_;
  float *x_, *qkv_, *mixed_, *gated_, *logits_, *own_;
  double* sums_;
  Buffer<Neighbours> neighbours_room_;
  Buffer<float> x_room_, qkv_room_, mixed_room_, gated_room_, logits_room_, own_room_;
  Buffer<double> sums_room_;
};

bool inside(const int64_t* numbers, int64_t count, int64_t end) {
  return std::all_of(numbers, numbers + count, [end](int64_t x) { return 0 <= x && x < end; });
}

bool sound(const DecodeModel& model, const DecodeRows& rows, int64_t steps) {
  const int32_t *offsets = rows.offsets, *length = rows.prompt_length;
  return steps > 0 && rows.step >= 0 && rows.step <= rows.own_capacity - steps && offsets[0] == 0 &&
         offsets[rows.groups] == rows.rows && std::is_sorted(offsets, offsets + rows.groups + 1) &&
         std::all_of(length, length + rows.groups, [&](int32_t n) { return 0 <= n && n <= rows.prompt_capacity; }) &&
         inside(rows.token, rows.rows, model.vocabulary) && inside(rows.angle, rows.rows, rows.angles - steps + 1);
}

bool sound(const DecodeRows& rows, const Sampler& sampler, int64_t steps) {
  return sampler.column >= 0 && sampler.column <= sampler.columns - steps &&
         inside(sampler.line, rows.rows, sampler.lines) &&
         inside(sampler.suppressed, sampler.suppressed_count, sampler.head.outputs);
}

}  // namespace
}  // namespace fastrl

#define FASTRL_API extern "C" __attribute__((visibility("default")))

// Instruction sets of this machine: levels 0 to this number can be asked for below.
FASTRL_API int fastrl_decode_level(void) { return fastrl::best_level(); }

// Feeds each row's token, and with a sampler draws the next one, up to `steps` times (without: once). `parallel` is
// GOMP_parallel of the OpenMP runtime, or null for one thread. Returns the steps done, -1 when memory ran out, -2 for
// numbers in memory that do not fit the sizes, -3 for a level that the machine does not have.
FASTRL_API int64_t fastrl_decode(const fastrl::DecodeModel* model, const fastrl::DecodeRows* rows,
                                 const fastrl::Sampler* sampler, int64_t steps, int threads, fastrl::Parallel parallel,
                                 int level) {
  using namespace fastrl;
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return kNoLevel;
  if (!sampler) steps = 1;
  if (!sound(*model, *rows, steps) || (sampler && !sound(*rows, *sampler, steps))) return kBadRows;
  try {
    return Steps(*model, *rows, sampler, steps, parallel ? std::max(threads, 1) : 1, *kernels).run(parallel);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
