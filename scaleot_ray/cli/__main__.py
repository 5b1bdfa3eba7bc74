"""``python -m scaleot_ray.cli`` is ``scaleot``."""

from scaleot_ray.cli.main import main

if __name__ == "__main__":
    main()
