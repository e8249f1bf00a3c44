// What fastrl_decode is handed. kernels/fastrl_kernels/decode_step.py lays out the same structs and checks every shape;
// numbers that only memory holds (tokens, lengths, offsets) are checked here.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace fastrl {

struct Norm {
  const float* weight;  // null: there is none
  double eps;
};

struct DecodeLayer {
  Norm before_attention, queries, keys, before_gate;  // queries, keys: of each head, may be none
  Linear query, key, value, output, gate, up, down;
  double scale;                // on the scores
  const float* prompt_keys;    // [groups, key heads, prompt capacity, D]
  const float* prompt_values;
  float* own_keys;             // [rows, key heads, own capacity, D]
  float* own_values;
};

struct DecodeModel {
  int64_t hidden, query_heads, key_heads, head_dim, layers, vocabulary;
  const DecodeLayer* layer;
  const float* embedding;  // [vocabulary, hidden]
  Norm last;
};

struct DecodeRows {
  int64_t rows, groups, prompt_capacity, own_capacity;
  int64_t step;                  // own keys that every row has
  const int32_t* offsets;        // [groups + 1]: rows of a group are neighbours
  const int32_t* prompt_length;  // [groups]
  int64_t* token;                // [rows]: to be fed; afterwards the last ones drawn
  const float* cos;              // [angles, D / 2]
  const float* sin;
  const int64_t* angle;          // [rows]: the line of each row's token; those of its next ones follow
  int64_t angles;
  float* hidden;                 // [rows, hidden] of the tokens fed: where no sampler is given
};

struct Sampler {
  Linear head;               // of the vocabulary
  double temperature;        // 0: the likeliest
  const int64_t* suppressed; // never drawn
  int64_t suppressed_count;
  const int64_t* ends;       // tokens behind which a row is no longer alive
  int64_t ends_count;
  const int64_t* line;       // [rows]: which line of the tables below is a row's
  int64_t lines, columns, column;  // of the tables; the column of the first token drawn
  const double* uniform;     // [lines, columns] in [0, 1), null where the temperature is 0
  int64_t* tokens;           // [lines, columns]
  float* logp;               // [lines, columns]
  uint8_t* alive;            // [rows]
  int64_t stop_at;           // return when this many rows or fewer are alive
};

}  // namespace fastrl
