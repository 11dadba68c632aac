"Package metadata comes from settings.ini; edit that file, not this one."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license={'apache2':'Apache-2.0'}[cfg['license']],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=[f"Development Status :: {cfg['status']} - Alpha", f"Intended Audience :: {cfg['audience']}", 'Operating System :: POSIX :: Linux',
                 *(f'Programming Language :: Python :: 3.{v}' for v in range(11, 14))],
    packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg.get('requirements', '')),
    extras_require={k[:-len('_requirements')]: shlex.split(v) for k,v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': shlex.split(cfg.get('console_scripts', '')), 'nbdev': [f'{lib}={lib}._modidx:d']},
)
