// What takes MTCNN's time on a CPU: its layers, for networks_compiled.py, and what they look at, for area.py.
//
// Maps are float32 (n, height, width, channels), contiguous. Every output is a sum in the order of its inputs, whatever
// is computed beside it: what is found in a photograph does not depend on what it is batched with. Up to LANES − 1
// floats may be written beyond a result.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define CPU __attribute__((target("avx2,fma")))
#else
#define CPU
#endif
#define INLINE CPU static inline __attribute__((always_inline))

constexpr int64_t LANES = 8;  // floats in a vector
constexpr int TILE = 6;       // pixels whose sums, two vectors of channels each, stay in registers
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef float Pixel __attribute__((vector_size(4 * sizeof(float))));  // and a fourth that is nothing

INLINE Vector load(const float *place) {
    Vector vector;
    std::memcpy(&vector, place, sizeof vector);
    return vector;
}

INLINE void store(Vector vector, float *place) { std::memcpy(place, &vector, sizeof vector); }

struct Layer {
    int64_t kernel;        // its side
    int64_t in, channels;  // input and output
    const float *weights;  // for each two vectors of output channels (or one, the last): kernel, kernel, in, channels
    const float *bias, *slope;  // of each output channel, filled up to whole vectors

    int64_t padded() const { return (channels + LANES - 1) / LANES * LANES; }
};

struct Map {
    const float *pixels;
    int64_t height, width;
};

// Adds to the sums of `count` pixels, `step` apart, what `lines` lines of `length` inputs each have to say.
template <int count, int vectors>
INLINE void add(Vector (&sums)[count][vectors], const float *in, int64_t step, int64_t lines, int64_t row,
                int64_t length, const float *weights) {
    for (int64_t y = 0; y < lines; ++y, in += row)
        for (int64_t i = 0; i < length; ++i, weights += vectors * LANES)
            for (int pixel = 0; pixel < count; ++pixel)
                for (int v = 0; v < vectors; ++v) sums[pixel][v] += in[pixel * step + i] * load(weights + v * LANES);
}

INLINE void activate(Vector sum, const float *slope, float *out) {
    const Vector below = sum * load(slope);
    store(sum > 0 ? sum : below, out);
}

// `count` neighbouring pixels of a row, or as many as are left, of `vectors` vectors of output channels.
template <int vectors, int count = TILE>
INLINE void pixels(int64_t left, const Layer &layer, const float *in, int64_t row, const float *weights,
                   int64_t channel, float *out) {
    if constexpr (count > 1)
        if (left < count) return pixels<vectors, count - 1>(left, layer, in, row, weights, channel, out);
    Vector sums[count][vectors];
    for (int pixel = 0; pixel < count; ++pixel)
        for (int v = 0; v < vectors; ++v) sums[pixel][v] = load(layer.bias + channel + v * LANES);
    add(sums, in, layer.in, layer.kernel, row, layer.kernel * layer.in, weights);
    for (int pixel = 0; pixel < count; ++pixel)
        for (int v = 0; v < vectors; ++v)
            activate(sums[pixel][v], layer.slope + channel + v * LANES,
                     out + pixel * layer.padded() + channel + v * LANES);
}

// Convolution and PReLU by the definition, to pixels of padded() channels.
CPU static void convolve(const Layer &layer, const Map &map, float *out) {
    const int64_t height = map.height - layer.kernel + 1, width = map.width - layer.kernel + 1,
                  row = map.width * layer.in, size = layer.kernel * layer.kernel * layer.in;
    for (int64_t y = 0; y < height; ++y, out += width * layer.padded()) {
        const float *in = map.pixels + y * row, *weights = layer.weights;
        for (int64_t channel = 0; channel < layer.padded();) {
            const int64_t vectors = channel + 2 * LANES <= layer.padded() ? 2 : 1;
            for (int64_t x = 0; x < width; x += TILE)
                if (vectors == 2)
                    pixels<2>(width - x, layer, in + x * layer.in, row, weights, channel, out + x * layer.padded());
                else
                    pixels<1>(width - x, layer, in + x * layer.in, row, weights, channel, out + x * layer.padded());
            channel += vectors * LANES;
            weights += vectors * LANES * size;
        }
    }
}

// Products of `count` tiles, or as many as are left, with the weights of one of their 16 places.
template <int vectors, int count = TILE>
INLINE void products(int64_t left, const float *in, int64_t step, int64_t length, const float *weights, float *out) {
    if constexpr (count > 1)
        if (left < count) return products<vectors, count - 1>(left, in, step, length, weights, out);
    Vector sums[count][vectors] = {};
    add(sums, in, step, 1, 0, length, weights);
    for (int tile = 0; tile < count; ++tile)
        for (int v = 0; v < vectors; ++v) store(sums[tile][v], out + (tile * vectors + v) * LANES);
}

// The tile of a map whose upper left corner is (y, x), 4×4 and repeated at the edges, as minimal filtering wants it:
// Bᵀ d B of each channel, its 16 places `apart` from one another.
INLINE void transform(const Layer &layer, const Map &map, int64_t y, int64_t x, float *out, int64_t apart) {
    const float *pixels[4][4];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
            pixels[i][j] = map.pixels + (std::min(y + i, map.height - 1) * map.width +
                                         std::min(x + j, map.width - 1)) * layer.in;
    for (int64_t begin = 0; begin < layer.in; begin += LANES) {
        const int64_t channel = std::min(begin, layer.in - LANES);
        Vector rows[4][4];
        for (int j = 0; j < 4; ++j) {
            const Vector a = load(pixels[0][j] + channel), b = load(pixels[1][j] + channel),
                         c = load(pixels[2][j] + channel), d = load(pixels[3][j] + channel);
            rows[0][j] = a - c, rows[1][j] = b + c, rows[2][j] = c - b, rows[3][j] = b - d;
        }
        for (int i = 0; i < 4; ++i) {
            const Vector a = rows[i][0], b = rows[i][1], c = rows[i][2], d = rows[i][3];
            float *place = out + 4 * i * apart + channel;
            store(a - c, place);
            store(b + c, place + apart);
            store(c - b, place + 2 * apart);
            store(b - d, place + 3 * apart);
        }
    }
}

// A tile of 2×2 outputs, Aᵀ m A of its 16 places, of a vector of channels: those of them that lie on a map of (height,
// width), to its pixel (y, x).
INLINE void untransform(const Layer &layer, const float *places, int64_t apart, int64_t channel, int64_t height,
                        int64_t width, int64_t y, int64_t x, float *out) {
    Vector rows[2][4];
    for (int j = 0; j < 4; ++j) {
        const Vector a = load(places + j * apart), b = load(places + (j + 4) * apart),
                     c = load(places + (j + 8) * apart), d = load(places + (j + 12) * apart);
        rows[0][j] = a + b + c, rows[1][j] = b - c - d;
    }
    const Vector bias = load(layer.bias + channel);
    for (int i = 0; i < 2 && y + i < height; ++i) {
        const Vector a = rows[i][0], b = rows[i][1], c = rows[i][2], d = rows[i][3];
        float *pixel = out + ((y + i) * width + x) * layer.padded() + channel;
        activate(a + b + c + bias, layer.slope + channel, pixel);
        if (x + 1 < width) activate(b - c - d + bias, layer.slope + channel, pixel + layer.padded());
    }
}

// What `convolve` does, of a kernel of 3, with 4 multiplications an output instead of 9: minimal filtering F(2×2, 3×3)
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016). The layer's weights are transformed
// ones, (4, 4, in, channels). Of tiles at the edge, what lies beyond it is not written, and what is written depends on
// nothing beyond.
CPU static void filter(const Layer &layer, const Map &map, float *transformed, float *out) {
    const int64_t height = map.height - 2, width = map.width - 2, across = (width + 1) / 2,
                  tiles = across * ((height + 1) / 2), step = (layer.in + LANES - 1) / LANES * LANES;
    float product[16][TILE * 2 * LANES];
    for (int64_t first = 0; first < tiles; first += TILE) {
        const int64_t count = std::min<int64_t>(TILE, tiles - first);
        for (int64_t tile = 0; tile < count; ++tile)
            transform(layer, map, (first + tile) / across * 2, (first + tile) % across * 2, transformed + tile * step,
                      TILE * step);
        const float *weights = layer.weights;
        for (int64_t channel = 0; channel < layer.padded();) {
            const int64_t vectors = channel + 2 * LANES <= layer.padded() ? 2 : 1;
            for (int place = 0; place < 16; ++place, weights += vectors * LANES * layer.in)
                if (vectors == 2)
                    products<2>(count, transformed + place * TILE * step, step, layer.in, weights, product[place]);
                else
                    products<1>(count, transformed + place * TILE * step, step, layer.in, weights, product[place]);
            for (int64_t tile = 0; tile < count; ++tile)
                for (int64_t v = 0; v < vectors; ++v)
                    untransform(layer, product[0] + (tile * vectors + v) * LANES, TILE * 2 * LANES, channel + v * LANES,
                                height, width, (first + tile) / across * 2, (first + tile) % across * 2, out);
            channel += vectors * LANES;
        }
    }
}

INLINE Vector max(Vector a, Vector b) {
#if defined(__x86_64__)  // one instruction, where GCC makes two of the line below
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// The maxima of windows of `side` pixels, up to three, `apart` from one another, the last of which may reach beyond the
// edge; from padded() channels to those there are. `highest` has room for a line.
CPU static void pool(const Layer &layer, const Map &map, int64_t side, int64_t apart, float *highest, float *out) {
    const int64_t stride = layer.padded(), line = map.width * stride;
    for (int64_t y = 0; y == 0 || y + side < map.height + apart; y += apart) {
        const int64_t below = std::min(y + side, map.height) - 1;
        const float *a = map.pixels + y * line, *b = map.pixels + std::min(y + 1, below) * line,
                    *c = map.pixels + below * line;
        for (int64_t i = 0; i < line; i += LANES)
            store(max(max(load(a + i), load(b + i)), load(c + i)), highest + i);
        for (int64_t x = 0; x == 0 || x + side < map.width + apart; x += apart, out += layer.channels) {
            const int64_t right = std::min(x + side, map.width) - 1;
            const float *first = highest + x * stride, *second = highest + std::min(x + 1, right) * stride,
                        *third = highest + right * stride;
            for (int64_t i = 0; i < layer.channels; i += LANES)
                store(max(max(load(first + i), load(second + i)), load(third + i)), out + i);
        }
    }
}

// Convolution without padding, PReLU, and max pooling (stride 2, side 2 or 3; 1 for none).
CPU static void run(Layer layer, const float *maps, int64_t n, int64_t height, int64_t width, bool minimal,
                    int64_t side, float *out) {
    if (height == layer.kernel && width == layer.kernel) {  // a dense layer: its inputs are the pixels of one row
        layer.in *= height * width;
        layer.kernel = height = 1;
        width = n;
        n = 1;
    }
    const int64_t down = height - layer.kernel + 1, across = width - layer.kernel + 1, apart = side > 1 ? 2 : 1;
    const auto pooled = [=](int64_t length) { return length <= side ? 1 : (length - side + apart - 1) / apart + 1; };
    const int64_t line = across * layer.padded(), pooled_line = pooled(across) * layer.channels;
    const bool as_it_is = side == 1 && layer.channels == layer.padded();
    std::vector<float> transformed(minimal ? 16 * TILE * (layer.in + LANES) : 0);
    std::vector<float> highest(line), convolved(as_it_is ? 0 : (minimal ? down : side) * line);
    for (int64_t i = 0; i < n; ++i, maps += height * width * layer.in, out += pooled(down) * pooled_line) {
        float *to = as_it_is ? out : convolved.data();
        if (minimal || as_it_is) {
            if (minimal)
                filter(layer, {maps, height, width}, transformed.data(), to);
            else
                convolve(layer, {maps, height, width}, to);
            if (!as_it_is) pool(layer, {to, down, across}, side, apart, highest.data(), out);
            continue;
        }
        int64_t done = 0;  // lines; those of one window at a time, which stay in the first cache
        for (int64_t y = 0; y < pooled(down); ++y) {
            const int64_t first = apart * y, last = std::min(first + side, down);
            const int64_t kept = std::max<int64_t>(done - first, 0);
            std::copy(to + apart * line, to + (apart + kept) * line, to);
            const Map left = {maps + (first + kept) * width * layer.in, last - first - kept + layer.kernel - 1, width};
            convolve(layer, left, to + kept * line);
            pool(layer, {to, last - first, across}, side, apart, highest.data(), out + y * pooled_line);
            done = last;
        }
    }
}

// Of each of `count` equal parts of a line of `length` pixels, the first pixel that lies in it, and its share of that
// and of each of the next ones: `most` shares for every part, of which the last may be nothing.
struct Parts {
    int64_t most;
    std::vector<int64_t> first;
    std::vector<float> shares;

    Parts(int64_t length, int64_t count) : most(length / count + 2), first(count), shares(count * most) {
        const double size = double(length) / double(count);
        for (int64_t part = 0; part < count; ++part) {
            const double begin = double(part) * size, end = double(part + 1) * size;
            first[part] = int64_t(begin);
            for (int64_t i = 0; i < most; ++i) {
                const double from = std::max(begin, double(first[part] + i)),
                             to = std::min(end, double(std::min(first[part] + i + 1, length)));
                shares[part * most + i] = float(std::max(to - from, 0.) / size);
            }
        }
    }
};

INLINE Vector load(const uint8_t *bytes) {
#if defined(__x86_64__)  // what GCC makes of the lines below takes several times as long
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes))));
#else
    uint8_t some __attribute__((vector_size(LANES)));
    std::memcpy(&some, bytes, sizeof some);
    return __builtin_convertvector(some, Vector);
#endif
}

// Adds to `count` sums the bytes of two rows, each by its share.
CPU static void add(float *sums, const uint8_t *const *rows, const float *shares, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(load(sums + i) + shares[0] * load(rows[0] + i) + shares[1] * load(rows[1] + i), sums + i);
    for (; i < count; ++i) sums[i] = sums[i] + shares[0] * float(rows[0][i]) + shares[1] * float(rows[1][i]);
}

// What lies in a box of an RGB photograph, black where that is outside, at (rows, columns): each pixel is the mean of
// the area that falls onto it, rounded if `whole`, from −1 to 1.
CPU static void shrink(const uint8_t *image, int64_t height, int64_t width, const int64_t *box, int64_t rows,
                       int64_t columns, bool whole, float *out) {
    const int64_t left = box[0], top = box[1], across = box[2] - box[0], down = box[3] - box[1];
    const Parts vertical(down, rows), horizontal(across, columns);
    const int64_t from = std::clamp<int64_t>(-left, 0, across), to = std::clamp<int64_t>(width - left, from, across);
    std::vector<float> line(3 * (across + horizontal.most) + 1);
    float *inside = line.data() + 3 * from;
    for (int64_t y = 0; y < rows; ++y) {
        std::fill(inside, inside + 3 * (to - from), 0.f);
        for (int64_t i = 0; i < vertical.most; i += 2) {
            const uint8_t *two[2];
            float shares[2];
            for (int64_t j = 0; j < 2; ++j) {
                const int64_t row = top + vertical.first[y] + i + j;
                const bool any = row >= 0 && row < height && i + j < vertical.most;
                shares[j] = any ? vertical.shares[y * vertical.most + i + j] : 0;
                two[j] = image + 3 * ((any ? row : 0) * width + left + from);
            }
            if (shares[0] != 0 || shares[1] != 0) add(inside, two, shares, 3 * (to - from));
        }
        const float *share = horizontal.shares.data();
        for (int64_t x = 0; x < columns; ++x, out += 3) {
            const float *at = line.data() + 3 * horizontal.first[x];
            Pixel sum = {0, 0, 0, 0};
            for (int64_t i = 0; i < horizontal.most; ++i, ++share, at += 3) {
                Pixel pixel;
                std::memcpy(&pixel, at, sizeof pixel);
                sum += *share * pixel;
            }
            if (whole)
                for (int c = 0; c < 3; ++c) sum[c] = std::nearbyint(sum[c]);
            sum = (sum - 127.5f) * 0.0078125f;
            std::memcpy(out, &sum, sizeof sum);
        }
    }
}

extern "C" {

// Changes with what the functions below take or give: Python refuses what it was not written for.
int version() { return 1; }

int supported() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

// n maps (height, width, in) to n maps of `channels`; `minimal` where weights are those of minimal filtering.
void layer(const float *maps, int64_t n, int64_t height, int64_t width, int64_t kernel, int64_t in, int64_t channels,
           const float *weights, const float *bias, const float *slope, int minimal, int64_t side, float *out) {
    run({kernel, in, channels, weights, bias, slope}, maps, n, height, width, minimal, side, out);
}

// Of n boxes (left, top, right, bottom: pixels from 0, before the last two), each in its photograph (height, width), n
// pictures (rows, columns, 3).
void crops(const uint8_t *const *images, const int64_t *sizes, const int64_t *boxes, int64_t n, int64_t rows,
           int64_t columns, int whole, float *out) {
    for (int64_t i = 0; i < n; ++i, out += rows * columns * 3)
        shrink(images[i], sizes[2 * i], sizes[2 * i + 1], boxes + 4 * i, rows, columns, whole, out);
}
}
