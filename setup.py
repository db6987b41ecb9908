"""Packaging that pyproject.toml cannot say: `kernels/` is installed as `fastmmkd.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastmmkd", "fastmmkd.*"]), "fastmmkd.kernels"],
    package_dir={"fastmmkd.kernels": "kernels"},
)
