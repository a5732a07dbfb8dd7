from vitray.cli import entry

entry()
