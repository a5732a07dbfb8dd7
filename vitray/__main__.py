from vitray.cli import main

main()
