"""Train or evaluate a HaloNet on one device: python main_single_gpu.py -cfg FILE -data_path DIR [-eval -pretrained FILE] ..."""
from config import parse_args


def main():
    config = parse_args()                           # before Paddle is imported: -h and mistakes answer at once
    from engine import main
    main(config)


if __name__ == '__main__':
    main()
