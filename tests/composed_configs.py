"""Composes each choice of config groups once in a test process: a quarter of the time of short runs was Hydra's.

The values of single options are applied anew each time, and so is everything if a user's folder is searched too.
"""

import pickle
from dataclasses import replace

from hydra._internal import config_loader_impl, config_repository
from hydra._internal.defaults_list import Overrides

from odcheap.utils.parts import find_conf_dir

CONF = str(find_conf_dir())
create_defaults_list = config_loader_impl.create_defaults_list
compose_config = config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list
load_config = config_repository.ConfigRepository.load_config
files, defaults_lists, configs = {}, {}, {}


def list_sources(repo):
    """Returns where configs are searched for, or None if files there can change."""
    sources = [(source.scheme(), source.path) for source in repo.get_sources()]
    return tuple(sources) if all(scheme != "file" or path == CONF for scheme, path in sources) else None


def load_once(repo, config_path):
    sources = list_sources(repo)
    if sources is None:
        return load_config(repo, config_path)
    if (sources, config_path) not in files:
        files[sources, config_path] = pickle.dumps(load_config(repo, config_path))
    return pickle.loads(files[sources, config_path])


def create_defaults_list_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
    arguments = {"prepend_hydra": prepend_hydra, "skip_missing": skip_missing}
    sources = list_sources(repo)
    if sources is None:
        return create_defaults_list(repo, config_name, overrides_list, **arguments)
    given = Overrides(repo, overrides_list)
    choices = (given.override_choices, given.append_group_defaults, given.deletions)
    key = repr((sources, config_name, choices, arguments))
    if key not in defaults_lists:
        defaults_lists[key] = create_defaults_list(repo, config_name, overrides_list, **arguments)
    return replace(defaults_lists[key], config_overrides=given.config_overrides)


def compose_once(loader, defaults, repo):
    if list_sources(repo) is None:
        return compose_config(loader, defaults, repo)
    if id(defaults) not in configs:  # `defaults_lists` keeps it, so that no other list gets its number
        configs[id(defaults)] = pickle.dumps(compose_config(loader, defaults, repo))
    return pickle.loads(configs[id(defaults)])


def install():
    config_repository.ConfigRepository.load_config = load_once
    config_loader_impl.create_defaults_list = create_defaults_list_once
    config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list = compose_once
