/* Copies, sends and receives payloads in pieces, and computes their checksums. Each operation is a single call that
 * needs no Python (`native.py`).
 *
 * Checksums are XXH3, 64 bits, seed 0, default secret, of inputs longer than 240 bytes (xxHash's specification,
 * doc/xxhash_spec.md). Copies are checked on the way. Sends and receives are checked in steps, while the bytes of a
 * step are in a core's own cache.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <sys/socket.h>
#include <sys/uio.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)
#include <immintrin.h>
#define HAS_AVX2 1
#endif

#define STRIPE 64  /* bytes that go into the accumulators at once */
#define STRIPES 16 /* stripes of a block, after which the accumulators are scrambled */
#define BLOCK ((size_t)STRIPES * STRIPE)
#define STEP ((size_t)512 << 10)         /* bytes of a copy or send that stay in a core's own cache until the check */
#define RECEIVE_STEP ((size_t)128 << 10) /* less, because the system writes received bytes and fills the cache too */
#define VECTOR 64 /* pieces of one system call */
#define PATIENCE_NS 200000 /* busy-poll up to 200 us if the peer just sustained 2 GB/s; waking a thread costs more */
#define FAST_BYTES ((size_t)64 << 10) /* measure that rate over at least so many bytes between two waits */
#define FAST_BYTES_PER_US 2000 /* on a slower link it pays to sleep until the next bytes come */

static const uint32_t PRIME32_1 = 0x9E3779B1U, PRIME32_2 = 0x85EBCA77U, PRIME32_3 = 0xC2B2AE3DU;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87ULL, PRIME64_2 = 0xC2B2AE3D27D4EB4FULL,
                      PRIME64_3 = 0x165667B19E3779F9ULL, PRIME64_4 = 0x85EBCA77C2B2AE63ULL,
                      PRIME64_5 = 0x27D4EB2F165667C5ULL;

static const uint8_t SECRET[192] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

/* A running checksum. It holds some bytes back, because the last stripe ends with the input's last byte. */
typedef struct {
    uint64_t lanes[8];
    uint8_t before[STRIPE]; /* the stripe that went in last */
    uint8_t held[STRIPE];
    uint64_t held_bytes, total_bytes, left_bytes;
    uint64_t stripe; /* the index of the next stripe in its block */
} Checksum;

static uint64_t word(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static void mix_portable(uint64_t *lanes, const uint8_t *data, size_t stripes, const uint8_t *secret) {
    for (size_t n = 0; n < stripes; n++, data += STRIPE, secret += 8)
        for (int i = 0; i < 8; i++) {
            uint64_t value = word(data + 8 * i), key = value ^ word(secret + 8 * i);
            lanes[i ^ 1] += value;
            lanes[i] += (key & 0xFFFFFFFFU) * (key >> 32);
        }
}

#ifdef HAS_AVX2
/* Return half of the accumulators after half of a stripe has been mixed in. */
static inline __attribute__((always_inline, target("avx2"))) __m256i mixed(__m256i sum, __m256i value,
                                                                           const uint8_t *secret) {
    __m256i key = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)secret));
    __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    return _mm256_add_epi64(sum, _mm256_add_epi64(product, _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2))));
}

__attribute__((target("avx2"))) static void mix_avx2(uint64_t *lanes, const uint8_t *data, size_t stripes,
                                                     const uint8_t *secret) {
    __m256i low = _mm256_loadu_si256((const __m256i *)lanes), high = _mm256_loadu_si256((const __m256i *)lanes + 1);
    for (size_t n = 0; n < stripes; n++, data += STRIPE, secret += 8) {
        _mm_prefetch((const char *)data + 512, _MM_HINT_T0);
        low = mixed(low, _mm256_loadu_si256((const __m256i *)data), secret);
        high = mixed(high, _mm256_loadu_si256((const __m256i *)data + 1), secret + 32);
    }
    _mm256_storeu_si256((__m256i *)lanes, low);
    _mm256_storeu_si256((__m256i *)lanes + 1, high);
}
#endif

#if defined(HAS_AVX2) && !defined(NO_AVX512) && (defined(__clang__) || __GNUC__ >= 7)
#define HAS_AVX512 1
enum { NOWHERE, INTO_CACHE, PAST_CACHE_16, PAST_CACHE_64 }; /* a copy's target; the number is its alignment */

/* Mix in whole blocks (if `checked`), scramble included, with all operands in registers. Copy them on the way (unless
 * NOWHERE), while the next bytes come from memory. There are two sums of products, because additions to a single one
 * would wait for each other, and one sum of the words, which change places once a block. */
static inline __attribute__((always_inline, target("avx512f,avx512dq"))) void blocks_512(uint64_t *lanes, uint8_t *to,
                                                                                         const uint8_t *from,
                                                                                         size_t blocks, const int where,
                                                                                         const int checked) {
    __m512i sum = _mm512_setzero_si512(), secret[STRIPES], last = _mm512_loadu_si512(SECRET + 128);
    if (checked) sum = _mm512_loadu_si512(lanes);
    for (int n = 0; n < STRIPES; n++) secret[n] = _mm512_loadu_si512(SECRET + 8 * n);
    for (; blocks; blocks--) {
        __m512i odd = _mm512_setzero_si512(), words = odd;
#pragma GCC unroll 16
        for (int n = 0; n < STRIPES; n++, from += STRIPE) {
            _mm_prefetch((const char *)from + 1024, _MM_HINT_T0);
            __m512i value = _mm512_loadu_si512(from), key = _mm512_xor_si512(value, secret[n]);
            if (where == INTO_CACHE) _mm512_storeu_si512(to, value);
            if (where == PAST_CACHE_64) _mm512_stream_si512((void *)to, value);
            if (where == PAST_CACHE_16) {
                _mm_stream_si128((__m128i *)to, _mm512_castsi512_si128(value));
                _mm_stream_si128((__m128i *)to + 1, _mm512_extracti32x4_epi32(value, 1));
                _mm_stream_si128((__m128i *)to + 2, _mm512_extracti32x4_epi32(value, 2));
                _mm_stream_si128((__m128i *)to + 3, _mm512_extracti32x4_epi32(value, 3));
            }
            if (where != NOWHERE) to += STRIPE;
            if (!checked) continue;
            __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
            if (n % 2) odd = _mm512_add_epi64(odd, product);
            else sum = _mm512_add_epi64(sum, product);
            words = _mm512_add_epi64(words, value);
        }
        if (!checked) continue;
        words = _mm512_shuffle_epi32(words, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2));
        sum = _mm512_add_epi64(_mm512_add_epi64(sum, odd), words);
        sum = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64(sum, 47)), last);
        sum = _mm512_mullo_epi64(sum, _mm512_set1_epi64(PRIME32_1));
    }
    if (checked) _mm512_storeu_si512(lanes, sum);
    if (where >= PAST_CACHE_16) _mm_sfence(); /* another process may read the copy next */
}

__attribute__((target("avx512f,avx512dq"))) static void mix_blocks_512(uint64_t *lanes, const uint8_t *data,
                                                                       size_t blocks) {
    blocks_512(lanes, NULL, data, blocks, NOWHERE, 1);
}

__attribute__((target("avx512f,avx512dq"))) static void copy_blocks_512(uint64_t *lanes, uint8_t *to,
                                                                        const uint8_t *from, size_t blocks) {
    if (!lanes) blocks_512(NULL, to, from, blocks, (uintptr_t)to % 64 ? INTO_CACHE : PAST_CACHE_64, 0);
    else if ((uintptr_t)to % 64 == 0) blocks_512(lanes, to, from, blocks, PAST_CACHE_64, 1);
    else if ((uintptr_t)to % 16 == 0) blocks_512(lanes, to, from, blocks, PAST_CACHE_16, 1);
    else blocks_512(lanes, to, from, blocks, INTO_CACHE, 1);
}
#endif

static void mix(uint64_t *lanes, const uint8_t *data, size_t stripes, const uint8_t *secret) {
#ifdef HAS_AVX2
    if (__builtin_cpu_supports("avx2")) {
        mix_avx2(lanes, data, stripes, secret);
        return;
    }
#endif
    mix_portable(lanes, data, stripes, secret);
}

static void take_stripes(Checksum *sum, const uint8_t *data, size_t stripes) {
    while (stripes) {
#ifdef HAS_AVX512
        size_t blocks = sum->stripe ? 0 : stripes / STRIPES;
        if (blocks && __builtin_cpu_supports("avx512dq")) {
            mix_blocks_512(sum->lanes, data, blocks);
            data += blocks * STRIPES * STRIPE, stripes -= blocks * STRIPES;
            continue;
        }
#endif
        size_t now = STRIPES - sum->stripe;
        if (now > stripes) now = stripes;
        mix(sum->lanes, data, now, SECRET + 8 * sum->stripe);
        data += now * STRIPE, stripes -= now, sum->stripe += now;
        if (sum->stripe < STRIPES) return;
        for (int i = 0; i < 8; i++) {
            uint64_t lane = sum->lanes[i];
            sum->lanes[i] = (lane ^ (lane >> 47) ^ word(SECRET + 128 + 8 * i)) * PRIME32_1;
        }
        sum->stripe = 0;
    }
}

/* Begin the checksum of an input of `size` bytes, more than 240. */
void checksum_start(Checksum *sum, size_t size) {
    const uint64_t lanes[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memset(sum, 0, sizeof *sum);
    memcpy(sum->lanes, lanes, sizeof lanes);
    sum->total_bytes = sum->left_bytes = size;
}

static void checksum_add(Checksum *sum, const uint8_t *data, size_t size) {
    if (!sum || !size) return;
    sum->left_bytes -= size;
    int last = !sum->left_bytes;
    if (sum->held_bytes) {
        size_t fill = STRIPE - sum->held_bytes;
        if (fill > size) fill = size;
        memcpy(sum->held + sum->held_bytes, data, fill);
        sum->held_bytes += fill, data += fill, size -= fill;
        if (sum->held_bytes < STRIPE || (last && !size)) return;
        take_stripes(sum, sum->held, 1);
        memcpy(sum->before, sum->held, STRIPE);
    }
    size_t stripes = (size - (size_t)last) / STRIPE;
    if (stripes) {
        take_stripes(sum, data, stripes);
        data += stripes * STRIPE, size -= stripes * STRIPE;
        memcpy(sum->before, data - STRIPE, STRIPE);
    }
    memcpy(sum->held, data, size);
    sum->held_bytes = size;
}

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Return the checksum, once all bytes have been added. */
uint64_t checksum_end(const Checksum *sum) {
    uint8_t last[STRIPE];
    uint64_t lanes[8], result = sum->total_bytes * PRIME64_1;
    memcpy(last, sum->before + sum->held_bytes, STRIPE - sum->held_bytes);
    memcpy(last + STRIPE - sum->held_bytes, sum->held, sum->held_bytes);
    memcpy(lanes, sum->lanes, sizeof lanes);
    mix(lanes, last, 1, SECRET + 121);
    for (int i = 0; i < 4; i++)
        result += fold(lanes[2 * i] ^ word(SECRET + 11 + 16 * i), lanes[2 * i + 1] ^ word(SECRET + 19 + 16 * i));
    result = (result ^ (result >> 37)) * 0x165667919E3779F9ULL;
    return result ^ (result >> 32);
}

#ifdef HAS_AVX2
/* Copy whole blocks and mix them in (if `checked`) on the way, while the next bytes come from memory. An `aligned`
 * target (16 bytes) is written past the caches, so that its lines need not be read first and evict nothing. */
static inline __attribute__((always_inline, target("avx2"))) void copy_blocks(uint64_t *lanes, uint8_t *to,
                                                                              const uint8_t *from, size_t blocks,
                                                                              const int aligned, const int checked) {
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if (checked)
        for (int half = 0; half < 2; half++) sum[half] = _mm256_loadu_si256((const __m256i *)lanes + half);
    for (; blocks; blocks--) {
#pragma GCC unroll 16
        for (int n = 0; n < STRIPES; n++, from += STRIPE, to += STRIPE) {
            _mm_prefetch((const char *)from + 1024, _MM_HINT_T0);
            for (int half = 0; half < 2; half++) {
                __m256i value = _mm256_loadu_si256((const __m256i *)from + half);
                if (aligned) {
                    _mm_stream_si128((__m128i *)to + 2 * half, _mm256_castsi256_si128(value));
                    _mm_stream_si128((__m128i *)to + 2 * half + 1, _mm256_extracti128_si256(value, 1));
                } else _mm256_storeu_si256((__m256i *)to + half, value);
                if (checked) sum[half] = mixed(sum[half], value, SECRET + 8 * n + 32 * half);
            }
        }
        for (int half = 0; checked && half < 2; half++) {
            __m256i key = _mm256_loadu_si256((const __m256i *)(SECRET + 128) + half), value = sum[half];
            value = _mm256_xor_si256(_mm256_xor_si256(value, _mm256_srli_epi64(value, 47)), key);
            __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(value, 32), prime);
            sum[half] = _mm256_add_epi64(_mm256_mul_epu32(value, prime), _mm256_slli_epi64(high, 32));
        }
    }
    if (checked)
        for (int half = 0; half < 2; half++) _mm256_storeu_si256((__m256i *)lanes + half, sum[half]);
    _mm_sfence(); /* another process may read the copy next */
}

__attribute__((target("avx2"))) static void copy_whole(uint64_t *lanes, uint8_t *to, const uint8_t *from,
                                                       size_t blocks) {
    int aligned = (uintptr_t)to % 16 == 0;
#ifdef HAS_AVX512
    if (__builtin_cpu_supports("avx512dq")) {
        copy_blocks_512(lanes, to, from, blocks);
        return;
    }
#endif
    if (lanes && aligned) copy_blocks(lanes, to, from, blocks, 1, 1);
    else if (lanes) copy_blocks(lanes, to, from, blocks, 0, 1);
    else if (aligned) copy_blocks(lanes, to, from, blocks, 1, 0);
    else memcpy(to, from, blocks * BLOCK);
}
#endif

/* Copy `size` bytes, and add the written bytes to the checksum, if there is one. */
static void copy_add(Checksum *sum, uint8_t *to, const uint8_t *from, size_t size) {
#ifdef HAS_AVX2
    if (size > BLOCK && (!sum || !sum->held_bytes) && __builtin_cpu_supports("avx2")) {
        size_t before = sum ? (STRIPES - sum->stripe) % STRIPES * STRIPE : 0; /* the rest of a block that has begun */
        memcpy(to, from, before);
        checksum_add(sum, to, before);
        to += before, from += before, size -= before;
        size_t last = sum && sum->left_bytes == size, blocks = (size - last) / BLOCK;
        if (blocks) {
            copy_whole(sum ? sum->lanes : NULL, to, from, blocks);
            to += blocks * BLOCK, from += blocks * BLOCK, size -= blocks * BLOCK;
            if (sum) memcpy(sum->before, to - STRIPE, STRIPE), sum->left_bytes -= blocks * BLOCK;
        }
    }
#endif
    memcpy(to, from, size);
    checksum_add(sum, to, size);
}

/* Copy pieces into other pieces of the same total size; the checksum is of the copied bytes. */
void copy_pieces(Checksum *sum, const struct iovec *from, const struct iovec *to) {
    size_t taken = 0, given = 0;
    for (;;) {
        while (taken == from->iov_len && from->iov_len) from++, taken = 0;
        while (given == to->iov_len && to->iov_len) to++, given = 0;
        if (!from->iov_len || !to->iov_len) return; /* an empty piece ends either list */
        size_t size = from->iov_len - taken;
        if (size > to->iov_len - given) size = to->iov_len - given;
        if (size > STEP) size = STEP;
        copy_add(sum, (uint8_t *)to->iov_base + given, (const uint8_t *)from->iov_base + taken, size);
        taken += size, given += size;
    }
}

/* Add pieces to the checksum; an empty piece ends the list. */
void check_pieces(Checksum *sum, const struct iovec *pieces) {
    for (; pieces->iov_len; pieces++) checksum_add(sum, pieces->iov_base, pieces->iov_len);
}

/* How far a payload has moved; all zero at its beginning. */
typedef struct {
    uint64_t index;        /* the index of the next piece */
    uint64_t recent_bytes; /* the bytes that have moved since `recent_ns` */
    uint64_t recent_ns;    /* the start of the measurement: the beginning, or a wait after at least FAST_BYTES */
    uint64_t waiting_ns;   /* when polling began; 0 if the socket must not be polled */
} Way;

/* Advance by `size` bytes, and add them to the checksum. */
static void advance_pieces(Checksum *sum, struct iovec *pieces, Way *way, size_t size) {
    way->recent_bytes += size;
    while (size) {
        struct iovec *piece = pieces + way->index;
        size_t part = size < piece->iov_len ? size : piece->iov_len;
        checksum_add(sum, piece->iov_base, part);
        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part, size -= part;
        if (!piece->iov_len) way->index++;
    }
}

/* Fill `vector` with the next pieces, up to `limit` bytes of them. Return how many, and set `bytes` to their size. */
static size_t ahead(struct iovec *vector, const struct iovec *pieces, size_t index, size_t count, size_t *bytes,
                    size_t limit) {
    size_t used = 0;
    *bytes = 0;
    for (; index < count && used < VECTOR && *bytes < limit; index++, used++) {
        vector[used] = pieces[index];
        if (vector[used].iov_len > limit - *bytes) vector[used].iov_len = limit - *bytes;
        *bytes += vector[used].iov_len;
    }
    return used;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

/* Return whether to ask a socket that moved nothing now once more: for PATIENCE_NS if it has just been fast. To sleep
 * and be woken up would cost either side more than the wait. Other threads that need this core get it. */
static int again(Way *way) {
    uint64_t now = now_ns();
    if (way->recent_bytes >= FAST_BYTES) {
        int fast = way->recent_bytes > (now - way->recent_ns) * FAST_BYTES_PER_US / 1000;
        way->recent_bytes = 0, way->recent_ns = now, way->waiting_ns = fast ? now : 0;
    } else if (now - way->waiting_ns > PATIENCE_NS) way->waiting_ns = 0;
    if (way->waiting_ns) sched_yield();
    return way->waiting_ns != 0;
}

/* Send pieces on a non-blocking socket until it takes no more, and advance them. MSG_MORE, because more bytes follow
 * soon. Return the bytes sent, or minus the error if there were none. */
int64_t send_pieces(Checksum *sum, struct iovec *pieces, Way *way, int socket, size_t count) {
    int64_t sent = 0;
    if (!way->recent_ns) way->recent_ns = now_ns();
    while (way->index < count) {
        struct iovec vector[VECTOR];
        size_t wanted, used = ahead(vector, pieces, way->index, count, &wanted, STEP);
        struct msghdr message = {.msg_iov = vector, .msg_iovlen = used};
        ssize_t got = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            int error = got ? errno : EAGAIN;
            if (error == EAGAIN && again(way)) continue;
            return sent ? sent : -(int64_t)error;
        }
        sent += got;
        advance_pieces(sum, pieces, way, (size_t)got);
    }
    return sent;
}

/* Read from a non-blocking socket into pieces, and advance them, until about `limit` bytes have come or none are there.
 * Return the bytes received, 0 at the end of the stream, or minus the error if nothing came before it. */
int64_t receive_pieces(Checksum *sum, struct iovec *pieces, Way *way, int socket, size_t count, size_t limit) {
    int64_t received = 0;
    if (!way->recent_ns) way->recent_ns = now_ns();
    while ((size_t)received < limit && way->index < count) {
        struct iovec vector[VECTOR];
        size_t wanted, used = ahead(vector, pieces, way->index, count, &wanted, RECEIVE_STEP);
        ssize_t got = readv(socket, vector, (int)used);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            int error = got ? errno : 0;
            if (error == EAGAIN && again(way)) continue;
            return received ? received : -(int64_t)error;
        }
        received += got;
        advance_pieces(sum, pieces, way, (size_t)got);
    }
    return received;
}

size_t checksum_bytes(void) { return sizeof(Checksum); }
