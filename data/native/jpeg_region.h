// Decodes the rows and columns of a JPEG that a crop needs, and nothing else, to 4-byte pixels (R, G, B, anything).
#pragma once
#include <cstddef>
#include <cstdint>

// jpeglib.h needs FILE, so the order matters
#include <cstdio>

#include <csetjmp>
#include <jpeglib.h>
#include <vector>

namespace loader {

enum Status {
    OK = 0,
    UNREADABLE = 1,      // not a JPEG that libjpeg can open or go on with
    DAMAGED = 2,         // libjpeg went on after damaged or missing data and made up pixels
    WRONG_SIZE = 3,      // width and height differ from the data set's metadata, or raw bytes do not fit them
    NO_MEMORY = 4,
};

// One libjpeg decompressor, kept by each thread for all its images.
class JpegRegion {
public:
    JpegRegion();
    ~JpegRegion();
    JpegRegion(const JpegRegion &) = delete;
    bool usable() const { return usable_; }              // false: the library loaded is not the one compiled against

    Status open(const uint8_t *bytes, size_t size);      // reads the header
    int width() const { return (int)info_.image_width; }
    int height() const { return (int)info_.image_height; }

    // Begins decoding columns [x0, x1) from row y0 on of the image scaled by 1 / denominator (1, 2, 4 or 8).
    Status start(int denominator, int x0, int x1, int y0);
    int row_pixels() const { return (int)info_.output_width; }
    int pixel_offset() const { return offset_; }         // of column x0 within a decoded row
    Status read(uint8_t *first, size_t stride, int count);
    Status finish();                                     // the verdict on everything that was decoded; stops early

private:
    struct Errors {
        jpeg_error_mgr manager;
        jmp_buf jump;
        bool damaged;
    };
    static void on_error(j_common_ptr info);
    static void on_message(j_common_ptr info, int level);

    jpeg_decompress_struct info_;
    Errors errors_;
    int offset_ = 0;
    bool usable_ = false, cmyk_ = false;
};

}  // namespace loader
