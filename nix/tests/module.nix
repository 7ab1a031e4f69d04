# Claims about the module: the units it renders and the settings it accepts. The machine tests show that systemd accepts
# the units.
{
  self,
  nixpkgs,
  pkgs,
}:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) system;
  inherit (import ./lib/render.nix { inherit self nixpkgs system; }) scenarios machine;

  lines =
    configuration:
    lib.splitString "\n" configuration."etc/systemd/system/codex-responses-proxy.service";
  set = configuration: line: lib.elem line (lines configuration);
  command = configuration: lib.findFirst (lib.hasPrefix "ExecStart=") "" (lines configuration);

  native.hostPlatform = system;
  options = settings: (machine native settings).config.services.codex-responses-proxy;
  accepts = value: (builtins.tryEval (builtins.deepSeq value true)).success;
  acceptsKeyFile = keyFile: accepts (options { inherit keyFile; }).keyFile;
  acceptsUsers = allowedUsers: accepts (options { inherit allowedUsers; }).allowedUsers;
  # the package of a machine that doesn't set one
  packageOn =
    platform: (machine platform { }).options.services.codex-responses-proxy.package.default;
  # messages of the assertions that fail
  failures =
    settings:
    let
      inherit ((machine native settings).config) assertions;
    in
    lib.filter (lib.hasInfix "codex") (map (x: x.message) (lib.filter (x: !x.assertion) assertions));

  # what Codex reads
  codex = settings: (options settings).codexConfig.settings;
  provider = settings: (codex settings).model_providers.codex-responses-proxy;
  customised = codex {
    codexConfig.settings = {
      model = "a-model";
      model_providers.another.base_url = "https://another.example/v1";
    };
  };

  moduleOptions = map (option: lib.concatStringsSep "." (lib.drop 2 option.loc)) (
    lib.collect lib.isOption (machine native { }).options.services.codex-responses-proxy
  );
  # first cells of the table in docs/nixos.md
  optionOf = line: lib.defaultTo [ ] (builtins.match "\\| `([^`]+)` \\|.*" line);
  documentedOptions = lib.concatMap optionOf (
    lib.splitString "\n" (builtins.readFile ../../docs/nixos.md)
  );

  units = import ../units.nix { inherit self nixpkgs; };

  claims = with scenarios; {
    "key file is opened as stdin" = set plain "StandardInput=file:/run/secrets/openai-api-key";
    "every user is served by default" = !lib.hasInfix "--allow-user" (command plain);
    "allowedUsers are passed to the program" =
      lib.hasSuffix ''"--allow-user" "alice" "--allow-user" "@developers"''
        (command restricted);
    "UIDs of other users are visible with allowedUsers only" =
      set plain "PrivateUsers=true" && set restricted "PrivateUsers=false";
    "UIDs of other users are visible with upstreamUser, too" =
      let
        service = (machine native { upstreamUser = "litellm"; }).config.systemd.services.codex-responses-proxy;
      in
      !service.serviceConfig.PrivateUsers
      && lib.elem "AF_NETLINK" service.serviceConfig.RestrictAddressFamilies
      && lib.hasInfix ''"--upstream-user" "litellm"'' service.serviceConfig.ExecStart;
    "restarts back off" = set plain "RestartMaxDelaySec=1min" && set plain "RestartSteps=10";
    "port belongs to the socket" =
      lib.hasInfix "ListenStream=127.0.0.1:8400\n"
        other-port."etc/systemd/system/codex-responses-proxy.socket";

    "keyFile accepts an absolute path as a string" =
      acceptsKeyFile "/run/secrets/key" && failures { } == [ ];
    "keyFile rejects a store path" =
      !acceptsKeyFile "${builtins.storeDir}/00000000000000000000000000000000-key";
    "keyFile rejects a path literal" = !acceptsKeyFile /run/secrets/key;
    "keyFile rejects a relative path" = !acceptsKeyFile "secrets/key";
    "keyFile rejects a newline" = lib.length (failures { keyFile = "/run/secrets/key\n"; }) == 1;
    "allowedUsers accepts null and a list" = acceptsUsers null && acceptsUsers [ "alice" ];
    "allowedUsers rejects an empty list" = !acceptsUsers [ ];

    "native machine gets the flake's package" =
      (packageOn { inherit pkgs; }).drvPath == self.packages.${system}.default.drvPath;
    "cross-built machine gets a cross-built package" =
      let
        package = packageOn {
          buildPlatform = "x86_64-linux";
          hostPlatform = "riscv64-linux";
        };
      in
      package.stdenv.buildPlatform.system == "x86_64-linux"
      && package.stdenv.hostPlatform.system == "riscv64-linux"
      && accepts package.drvPath;
    "overlays of the machine apply to the package" =
      let
        package = packageOn {
          hostPlatform = system;
          overlays = [ (final: _: { installShellFiles = final.emptyDirectory; }) ];
        };
      in
      lib.any (input: lib.getName input == "empty-directory") package.nativeBuildInputs;

    "Codex is configured with the port" =
      (provider { port = 8400; }).base_url == "http://127.0.0.1:8400/v1";
    "Codex settings of the machine are merged in" =
      customised.model == "a-model"
      && customised.model_providers ? another
      && customised.model_provider == "codex-responses-proxy";
    "WebSocket is off by default" =
      !lib.hasInfix "--websocket" (command plain) && !provider { } ? supports_websockets;
    "websocket passes the flag and configures Codex" =
      lib.hasInfix ''"--websocket"'' (command restricted)
      && (provider { websocket = true; }).supports_websockets or false;

    "docs/nixos.md lists the module's options" =
      lib.naturalSort documentedOptions == lib.naturalSort moduleOptions;
    "contrib/systemd has the rendered units" =
      units
      == lib.mapAttrs (unit: _: builtins.readFile (../../contrib/systemd + "/${unit}")) (
        builtins.readDir ../../contrib/systemd
      );
  };
  failed = lib.attrNames (lib.filterAttrs (_: holds: !holds) claims);
in
if failed == [ ] then
  pkgs.runCommand "codex-responses-proxy-unit" { passthru.rendered = scenarios; } ''
    printf '%s\n' ${lib.escapeShellArgs (lib.attrNames claims)} >$out
  ''
else
  throw "module checks failed: ${lib.concatStringsSep "; " failed}"
