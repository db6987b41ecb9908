// See missing_draw.cpp; fastmmkd/ops/philox.py is the definition.

// Philox4x32-10 of the counters (first + block, sample, epoch, version), as uniforms [blocks, 4] in [0, 1); writes
// LANES blocks at a time.
void draw_uniforms(const DrawKey& key, uint32_t first, int64_t blocks, float* uniforms) {
  for (int64_t block = 0; block < blocks; block += LANES) {
    uint32_t words[4][LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      words[0][lane] = first + (uint32_t)block + (uint32_t)lane;
      words[1][lane] = key.sample;
      words[2][lane] = key.epoch;
      words[3][lane] = key.version;
    }
    uint32_t low = key.low, high = key.high;
    for (int round = 0; round < 10; ++round) {
      for (int lane = 0; lane < LANES; ++lane) {
        const uint64_t product0 = (uint64_t)words[0][lane] * 0xD2511F53u;
        const uint64_t product1 = (uint64_t)words[2][lane] * 0xCD9E8D57u;
        words[0][lane] = (uint32_t)(product1 >> 32) ^ words[1][lane] ^ low;
        words[1][lane] = (uint32_t)product1;
        words[2][lane] = (uint32_t)(product0 >> 32) ^ words[3][lane] ^ high;
        words[3][lane] = (uint32_t)product0;
      }
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
    for (int lane = 0; lane < LANES; ++lane) {
      for (int word = 0; word < 4; ++word) {
        uniforms[(block + lane) * 4 + word] = (float)(words[word][lane] >> 8) * 5.9604644775390625e-8f;  // 2^-24
      }
    }
  }
}

// The first two words of the counter (0, sample, epoch, version).
void draw_pattern(const DrawKey& key, uint32_t* words) {
  uint32_t c[4] = {0, key.sample, key.epoch, key.version};
  uint32_t low = key.low, high = key.high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)c[0] * 0xD2511F53u, product1 = (uint64_t)c[2] * 0xCD9E8D57u;
    c[0] = (uint32_t)(product1 >> 32) ^ c[1] ^ low;
    c[1] = (uint32_t)product1;
    c[2] = (uint32_t)(product0 >> 32) ^ c[3] ^ high;
    c[3] = (uint32_t)product0;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  words[0] = c[0];
  words[1] = c[1];
}
