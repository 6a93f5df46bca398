#include "jpeg_region.h"

#include <jerror.h>

#include <algorithm>

namespace loader {

// Fancy chroma upsampling looks one chroma sample sideways. A crop that libjpeg cuts at a block border has no such
// neighbour there, so a margin is decoded besides and the pixels come out as those of the whole image.
constexpr int MARGIN = 2;
constexpr int PADDING = 64;  // bytes that may lie between the last pixel's data and the end marker; more is lost data

#if JPEG_LIB_VERSION >= 70
static int scaled_size(const jpeg_component_info &part) { return part.DCT_h_scaled_size; }
static int smallest_scaled_size(const jpeg_decompress_struct &info) { return info.min_DCT_h_scaled_size; }
#else
static int scaled_size(const jpeg_component_info &part) { return part.DCT_scaled_size; }
static int smallest_scaled_size(const jpeg_decompress_struct &info) { return info.min_DCT_scaled_size; }
#endif

// Whether libjpeg can leave out columns. It forgets in doing so that a component may be decoded at another scale than the
// image and yet have to be enlarged: the colours of 4:1:0 at 1/2 and 1/4.
static bool crops_exactly(const jpeg_decompress_struct &info) {
    for (int c = 0; c < info.num_components; c++) {
        const jpeg_component_info &part = info.comp_info[c];
        const int size = scaled_size(part), smallest = smallest_scaled_size(info);
        const bool enlarged = info.max_h_samp_factor * smallest > size * part.h_samp_factor ||
                              info.max_v_samp_factor * smallest > size * part.v_samp_factor;
        if (size != smallest && enlarged) return false;
    }
    return true;
}

JpegRegion::JpegRegion() {
    info_.err = jpeg_std_error(&errors_.manager);
    errors_.manager.error_exit = on_error;
    errors_.manager.emit_message = on_message;
    errors_.damaged = false;
    if (setjmp(errors_.jump)) return;
    jpeg_create_decompress(&info_);
    usable_ = true;
}

JpegRegion::~JpegRegion() {
    if (usable_) jpeg_destroy_decompress(&info_);
}

void JpegRegion::on_error(j_common_ptr info) { longjmp(((Errors *)info->err)->jump, 1); }

void JpegRegion::on_message(j_common_ptr info, int level) {
    if (level >= 0) return;  // a trace, not a warning
    switch (info->err->msg_code) {
        // About the file's markers, not its pixels; photographs of good standing carry them.
        case JWRN_ADOBE_XFORM:
        case JWRN_JFIF_MAJOR:
        case JWRN_BOGUS_ICC:
            return;
        case JWRN_EXTRANEOUS_DATA:
            if (info->err->msg_parm.i[1] == JPEG_EOI && info->err->msg_parm.i[0] <= PADDING) return;
    }
    ((Errors *)info->err)->damaged = true;
}

Status JpegRegion::open(const uint8_t *bytes, size_t size) {
    errors_.damaged = false;
    if (size < 4 || !usable_) return UNREADABLE;
    if (setjmp(errors_.jump)) {
        jpeg_abort_decompress(&info_);
        return UNREADABLE;
    }
    jpeg_mem_src(&info_, const_cast<uint8_t *>(bytes), size);
    if (jpeg_read_header(&info_, TRUE) != JPEG_HEADER_OK) return UNREADABLE;
    return OK;
}

Status JpegRegion::start(int denominator, int x0, int x1, int y0) {
    if (setjmp(errors_.jump)) {
        jpeg_abort_decompress(&info_);
        return UNREADABLE;
    }
    info_.scale_num = 1;
    info_.scale_denom = denominator;
    info_.dct_method = JDCT_ISLOW;
    cmyk_ = info_.jpeg_color_space == JCS_CMYK || info_.jpeg_color_space == JCS_YCCK;
    info_.out_color_space = cmyk_ ? JCS_CMYK : JCS_EXT_RGBX;
    jpeg_start_decompress(&info_);
    const int left = std::max(0, x0 - MARGIN), right = std::min((int)info_.output_width, x1 + MARGIN);
    JDIMENSION at = left, columns = right - left;
    if (columns < info_.output_width && crops_exactly(info_)) jpeg_crop_scanline(&info_, &at, &columns);
    else at = 0;
    offset_ = x0 - (int)at;
    if (y0 > 0 && jpeg_skip_scanlines(&info_, y0) != (JDIMENSION)y0) return DAMAGED;
    return OK;
}

Status JpegRegion::read(uint8_t *first, size_t stride, int count) {
    if (setjmp(errors_.jump)) {
        jpeg_abort_decompress(&info_);
        return UNREADABLE;
    }
    JSAMPROW rows[16];
    for (int done = 0; done < count;) {
        const int some = std::min(count - done, 16);
        for (int i = 0; i < some; i++) rows[i] = first + (size_t)(done + i) * stride;
        const int got = (int)jpeg_read_scanlines(&info_, rows, some);
        if (got == 0) return DAMAGED;
        done += got;
    }
    if (!cmyk_) return OK;
    for (int r = 0; r < count; r++) {
        uint8_t *p = first + (size_t)r * stride;
        // Adobe's convention: stored inverted, so 255 means no ink. A byte product divided by 255, rounded.
        for (int i = 0; i < row_pixels(); i++, p += 4) {
            for (int c = 0; c < 3; c++) {
                const int product = (255 - p[c]) * p[3] + 128;
                p[c] = (uint8_t)std::max(0, p[3] - (((product >> 8) + product) >> 8));
            }
        }
    }
    return OK;
}

Status JpegRegion::finish() {
    if (setjmp(errors_.jump)) {
        jpeg_abort_decompress(&info_);
        return UNREADABLE;
    }
    const bool whole = info_.output_height > 0 && info_.output_scanline >= info_.output_height;
    if (whole) jpeg_finish_decompress(&info_);  // what follows the last pixel tells whether the data before it was all there
    jpeg_abort_decompress(&info_);
    return errors_.damaged ? DAMAGED : OK;
}

}  // namespace loader
