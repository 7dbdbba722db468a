"""Pictures that a page carries in itself."""
import base64
import io

from data import image_files

SIDE = 160                                          # longest side of a thumbnail, pixels: twice as sharp as it is shown
TINY = 64                                           # images up to this side are kept as they are and shown with their pixels


def thumbnail(path):
    """(data URI, whether to show it pixel by pixel) of an image file; ('', False) where it cannot be read."""
    try:
        image = image_files.read(path)
    except Exception:                               # Pillow may raise nearly anything for a damaged file
        return '', False
    tiny = max(image.size) <= TINY
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, 'PNG' if tiny else 'JPEG', quality=82)
    return f'data:image/{"png" if tiny else "jpeg"};base64,{base64.b64encode(buffer.getvalue()).decode()}', tiny
